// Schemas of the extension's operators, once for all devices; each device's sources register their implementations.
#include "memtrans.h"

namespace {

int64_t native_interface() {
  return memtrans::kInterface;
}

}  // namespace

// A fragment, because the package's other operators are registered in the same namespace from Python.
STABLE_TORCH_LIBRARY_FRAGMENT(memtrans, library) {
  library.def("native_interface() -> int");
  library.def(
      "native_knn_add_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) cursor, Tensor rows, Tensor new_keys, "
      "Tensor new_values, Tensor? count=None, Tensor? at=None) -> ()");
  library.def(
      "native_knn_search(Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int capacity, int k) -> "
      "(Tensor scores, Tensor slots)");
  library.def(
      "native_faiss_search(Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int capacity, int k) -> "
      "(Tensor scores, Tensor positions)");
  library.def("native_faiss_versions() -> (int headers, int library)");
}

STABLE_TORCH_LIBRARY_IMPL(memtrans, CompositeExplicitAutograd, library) {
  library.impl("native_interface", TORCH_BOX(&native_interface));
}
