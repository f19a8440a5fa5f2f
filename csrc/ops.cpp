// Schemas of the extension's operators, once for all devices; each device's sources register their implementations.
#include "memtrans.h"

// A fragment, because the package's other operators are registered in the same namespace from Python.
STABLE_TORCH_LIBRARY_FRAGMENT(memtrans, library) {
  library.def("native_interface() -> int");
  library.def("native_cuda_interface() -> int");
  library.def("native_faiss_interface() -> int");
  library.def(
      "native_knn_add_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) cursor, Tensor rows, Tensor new_keys, "
      "Tensor new_values, Tensor? count=None, Tensor? at=None, Tensor? first=None) -> ()");
  library.def(
      "native_knn_search(Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int capacity, int k) -> "
      "(Tensor scores, Tensor slots)");
  library.def("native_gather_pairs(Tensor keys, Tensor values, Tensor rows, Tensor slots, Tensor(a!) pairs) -> ()");
  library.def(
      "native_memory_attention(Tensor query, Tensor key, Tensor value, Tensor memory_keys, Tensor memory_values, "
      "Tensor rows, Tensor scores, Tensor slots, Tensor scale, Tensor? bias_table, Tensor? bias_dense, "
      "Tensor? memory_offset, Tensor? local_length, float dropout_p, Tensor? seed, bool causal, Tensor? key_mask, "
      "Tensor? first, float soft_cap, Tensor? sink) -> (Tensor out, Tensor lse)");
  library.def(
      "native_memory_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor query, "
      "Tensor key, Tensor value, Tensor memory_keys, Tensor memory_values, Tensor rows, Tensor scores, Tensor slots, "
      "Tensor scale, Tensor? bias_table, Tensor? bias_dense, Tensor? memory_offset, Tensor? local_length, "
      "float dropout_p, Tensor? seed, bool causal, Tensor? key_mask, Tensor? first, float soft_cap, Tensor? sink) -> "
      "(Tensor query, Tensor key, Tensor value, Tensor scale, Tensor bias_table, Tensor bias_dense, "
      "Tensor memory_offset, Tensor sink)");
  library.def("native_faiss_search(Tensor query, Tensor keys, int k) -> (Tensor scores, Tensor positions)");
  library.def("native_faiss_versions() -> (int headers, int library)");
}

STABLE_TORCH_LIBRARY_IMPL(memtrans, CompositeExplicitAutograd, library) {
  library.impl("native_interface", TORCH_BOX(&memtrans::interface_number));
}
