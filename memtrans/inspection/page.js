"use strict";
// The data goes into the page as text alone: nothing of it is ever read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const made = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const drawn = (name, values) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
  return node;
};
const percent = (points) => (points >= 1000 ? Math.round(points / 100) : (points / 100).toFixed(points < 10 ? 2 : 1)) + "\u202f%";
const count = (number) => number.toLocaleString("en");

const textAt = (position) => {
  let low = 0, high = data.pieces.length - 1;
  while (low <= high) {
    const middle = (low + high) >> 1, [begin, numbers] = data.pieces[middle];
    if (position < begin) high = middle - 1;
    else if (position >= begin + numbers.length) low = middle + 1;
    else return data.strings[numbers[position - begin]];
  }
  return undefined;
};
// A token with signs in place of what cannot be seen: ␣ for a space, ↵ for a line's end.
const withSigns = (node, text) => {
  for (const part of text.match(/[ \n\t]|[^ \n\t]+/g) || [""]) {
    const sign = { " ": "␣", "\n": "↵", "\t": "⇥", "": "∅" }[part];
    if (part === " ") node.append(made("wbr")); // a line may end where the space is
    node.append(sign ? made("span", sign, "sign") : part);
  }
  return node;
};
const stretch = (node, begin, end, marks, near) => {
  const shares = new Map(marks), largest = Math.max(1, ...marks.map((pair) => pair[1]));
  let first = null, plain = "", kind = "";
  const flush = () => { if (plain) node.append(made("span", plain, kind)); plain = ""; };
  for (let position = begin; position < end; position += 1) {
    const text = textAt(position);
    if (text === undefined) continue;
    if (shares.has(position)) {
      flush();
      const share = shares.get(position), level = Math.ceil((3 * share) / largest);
      const mark = withSigns(made("mark", undefined, "m" + level), text);
      if (share) mark.title = percent(share);
      node.append(mark);
      if (text.endsWith("\n")) node.append("\n");
      if (share === largest || first === null) first = share === largest ? mark : first || mark;
    } else {
      const here = near && position >= near[0] && position < near[1] ? "near" : "";
      if (here !== kind) { flush(); kind = here; }
      plain += text;
    }
  }
  flush();
  return first;
};

// ------------------------------------------------------------------------------------------------------ the text
const most = Math.max(1, ...data.tokens.map((token) => token.share));
const level = (share) => (share <= 0 ? 0 : Math.max(1, Math.ceil((4 * share) / most)));
const text = at("text"), writing = at("writing");
text.replaceChildren(made("span", data.prompt, "prompt"));
data.tokens.forEach((token, number) => {
  const node = made("span", undefined, "t s" + level(token.share));
  const [, lead, visible, breaks] = token.text.match(/^( *)([^]*?)(\n*)$/);
  if (visible) text.append(lead); // the space between two words belongs to neither to look at
  node.append(visible || lead);
  if (breaks) node.append(made("span", "↵", "sign"), breaks);
  node.id = "t" + number;
  node.setAttribute("role", "option");
  node.setAttribute("aria-selected", "false");
  node.title = percent(token.share) + " from the memory";
  node.addEventListener("click", () => choose(number));
  text.append(node);
});
const legend = at("legend");
legend.append(made("span", "Share of the weight that came from the memory:"));
for (let step = 1; step <= 4; step += 1) {
  const sample = made("span");
  sample.append(made("span", "\u2003\u2003", "t s" + step), " up to " + percent((most * step) / 4));
  legend.append(sample);
}
legend.append(made("span", "← and → go from word to word"));
at("model").textContent = data.model;

// ---------------------------------------------------------------------------------------------------- the choice
let chosen = -1, layer = 0;
// On opening the text's box alone is moved, so that the page begins with its title.
const choose = (number, opening) => {
  if (number < 0 || number >= data.tokens.length) return;
  if (chosen >= 0) at("t" + chosen).setAttribute("aria-selected", "false");
  chosen = number;
  const node = at("t" + chosen);
  node.setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", node.id);
  if (opening) writing.scrollTop += node.getBoundingClientRect().top - writing.getBoundingClientRect().top - writing.clientHeight / 3;
  else node.scrollIntoView({ block: "nearest" });
  show(data.tokens[chosen]);
};
const show = (token) => {
  at("detail").hidden = false;
  at("token").replaceChildren();
  withSigns(at("token"), token.text);
  at("share").textContent = percent(token.share) + " of its weight came from the memory" +
    (token.passages.length ? "" : "; nothing in it stood out");
  at("back").disabled = chosen === 0;
  at("on").disabled = chosen === data.tokens.length - 1;
  const boxes = token.passages.map(passage);
  at("passages").replaceChildren(...boxes.map((box) => box.article));
  for (const box of boxes) {
    if (box.mark) box.scrolled.scrollTop = box.mark.offsetTop - box.scrolled.clientHeight / 2 + 12;
  }
  strip(token, boxes);
  usual(token);
  if (at("layers").open) layers();
};
const passage = (found, number) => {
  const article = made("article"), heading = made("h3"), scrolled = made("div", undefined, "passage");
  heading.append(made("span", number + 1 + " · " + percent(found.share) + " of the weight"),
    made("span", "token " + count(found.begin) + " of " + count(data.length)));
  const begin = Math.max(0, found.begin - data.around), end = Math.min(data.length, found.end + data.around);
  if (begin > 0) scrolled.append("… ");
  const mark = stretch(scrolled, begin, end, found.marks, [found.begin, found.end]);
  if (end < data.length) scrolled.append(" …");
  scrolled.tabIndex = 0;
  scrolled.setAttribute("role", "region");
  scrolled.setAttribute("aria-label", "Passage " + (number + 1));
  article.append(heading, scrolled);
  return { article, scrolled, mark };
};

// ------------------------------------------------------------------------------------------------------ the strip
const strip = (token, boxes) => {
  const width = 960, svg = at("strip"), bin = width / data.strip.length;
  svg.setAttribute("viewBox", "0 0 " + width + " 44");
  svg.replaceChildren(drawn("rect", { class: "base", x: 0, y: 40, width, height: 3 }));
  data.strip.forEach((height, number) => {
    if (height) svg.append(drawn("rect", { class: "all", x: number * bin, y: 40 - 0.22 * height, width: bin, height: 0.22 * height }));
  });
  token.passages.forEach((found, number) => {
    const x = Math.min(width - 5, (width * found.begin) / data.length);
    const pin = drawn("rect", { class: number ? "pin second" : "pin", x, y: number ? 16 : 6, width: 5, height: number ? 27 : 37, rx: 2 });
    pin.append(drawn("title", {}));
    pin.firstChild.textContent = "Passage " + (number + 1);
    pin.addEventListener("click", () => boxes[number].scrolled.focus());
    svg.append(pin);
  });
  svg.setAttribute("aria-label", "Where the passages stand in the document: " +
    (token.passages.map((found) => Math.round((100 * found.begin) / data.length) + " %").join(", ") || "none"));
};
at("ends").append(made("span", "beginning of " + data.source), made("span", count(data.length) + " tokens"));

// --------------------------------------------------------------------------------------------- what is usual, layers
const inContext = (node, position) => {
  stretch(node, Math.max(0, position - 8), Math.min(data.length, position + 5), [[position, 0]]);
  return node;
};
const usual = (token) => {
  const [summary, list] = at("usual").children;
  at("usual").hidden = !token.usual.length;
  summary.textContent = "Looked up by most words alike (" + token.usual.length + ")";
  list.replaceChildren(...token.usual.map(([position, share]) => {
    const item = made("li");
    item.append(inContext(made("span"), position), made("span", percent(share), "quiet"));
    return item;
  }));
};
const layers = () => {
  const token = data.tokens[chosen], largest = Math.max(1, ...token.layers.map((of) => of.share));
  at("bars").replaceChildren(...token.layers.map((of, number) => {
    const button = made("button", data.layers[number]), bar = made("i");
    button.type = "button";
    button.append(made("span", percent(of.share), "number"), bar);
    bar.style.width = (100 * of.share) / largest + "%";
    button.setAttribute("aria-pressed", String(number === layer));
    button.addEventListener("click", () => { layer = number; layers(); at("bars").children[number].focus(); });
    return button;
  }));
  at("layer").textContent = data.layers[layer] + (data.heads ? "," : "");
  const found = token.layers[layer].best, select = at("heads"), heads = new Set();
  for (const entry of found) for (let place = 0; place < entry[3].length; place += 2) heads.add(entry[3][place]);
  const before = select.value;
  select.hidden = !data.heads;
  select.replaceChildren(new Option("all heads", ""), ...[...heads].sort((a, b) => a - b).map((head) => new Option("head " + (head + 1), head)));
  select.value = [...select.options].some((option) => option.value === before) ? before : "";
  entries(found, select.value);
};
const entries = (found, head) => {
  const rows = found.map(([position, share, background, heads]) => {
    const of = [];
    for (let place = 0; place < heads.length; place += 2) of.push([heads[place], heads[place + 1]]);
    const own = of.find((pair) => String(pair[0]) === head);
    return { position, share: head === "" ? share : own ? own[1] : -1, background, of };
  }).filter((row) => row.share >= 0).sort((a, b) => (head === "" ? 0 : b.share - a.share));
  at("entries").replaceChildren(...rows.map((row) => {
    const node = made("tr");
    const of = row.of.sort((a, b) => b[1] - a[1]).map(([number, share]) => number + 1 + ":\u00a0" + percent(share));
    node.append(inContext(made("td"), row.position), made("td", count(row.position)), made("td", percent(row.share)),
      made("td", percent(row.background)), made("td", of.slice(0, 4).join(", ") + (of.length > 4 ? " …" : "")));
    return node;
  }));
  at("rest").textContent = "The " + data.entries + " best entries of each layer" +
    (data.heads ? "" : ", without their heads, because the page would be too large") + "; all of them are in the file that --json writes.";
};
at("layers").addEventListener("toggle", () => { if (at("layers").open) layers(); });
at("heads").addEventListener("change", layers);
at("back").addEventListener("click", () => choose(chosen - 1));
at("on").addEventListener("click", () => choose(chosen + 1));
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, .passage")) return;
  const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: data.tokens.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
});
// The text's box ends where the window does, below whatever height the title has.
const fit = () => document.documentElement.style.setProperty("--head", document.querySelector("header").offsetHeight + "px");
window.addEventListener("resize", fit);
if (data.tokens.length) {
  legend.hidden = false;
  fit();
  // A word says more than a line's end or a comma that looked up as much.
  const worth = (token) => token.passages[0].share + (/[\p{L}\p{N}]/u.test(token.text) ? 1e4 : 0);
  const strength = data.tokens.map((token) => (token.passages.length ? worth(token) : 0));
  choose(strength.indexOf(Math.max(...strength)), true);
}
