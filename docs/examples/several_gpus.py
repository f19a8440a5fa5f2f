"""One document's memory spread over several processes: each keeps a share, and every search finds in all of them.

torchrun --nproc-per-node=8 several_gpus.py    on eight GPUs; python several_gpus.py is one process, on the CPU too
"""

import os

import torch
import torch.distributed as dist

from memtrans import MemorizingTransformer

SEGMENT, STEPS = 128, 4
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}.items():
    os.environ.setdefault(name, value)  # torchrun has set them
on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
dist.init_process_group("nccl" if on_gpu else "gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights on every rank
model = MemorizingTransformer(
    num_tokens=256,
    dim=64,
    depth=2,
    heads=4,
    dim_head=16,
    memorizing_layers=(2,),
    num_retrieved_memories=16,
).to("cuda" if on_gpu else "cpu")
memories = model.create_knn_memories(batch_size=1, process_group=group, max_memories=size * 4096)
document = torch.randint(0, 256, (1, STEPS * size * SEGMENT))
with torch.no_grad():
    for pieces in document.split(size * SEGMENT, dim=1):
        segment = pieces.split(SEGMENT, dim=1)[rank]  # each rank reads its piece of what comes next
        logits = model(segment.to(next(model.parameters()).device), memories)
if rank == 0:
    print(f"{size} ranks remember {document.shape[1]} entries together; logits {tuple(logits.shape)}")
dist.destroy_process_group()
