// What the tensors of a call are and where they lie, through the table of C functions that DLPack has a framework offer.
// To ask for all of it from Python takes longer than the step of a small model.
#include "spg_kernels.h"

namespace {

// DLPack 1.x: its layout is the same for every x.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

constexpr int64_t AHEAD = 8;  // tensors

bool is_plain(const SpgPython& python, void* object) {
  void* type = python.type_of(object);
  python.release(type);
  return type == python.tensor_type || type == python.parameter_type;
}

template <typename Word>
bool describe(const DLTensor& tensor, Word word) {
  if (!word(static_cast<int64_t>(tensor.device.type) << 32 | static_cast<uint32_t>(tensor.device.id))) return false;
  if (!word(static_cast<int64_t>(tensor.dtype.lanes) << 16 | tensor.dtype.code << 8 | tensor.dtype.bits)) return false;
  if (!word(tensor.ndim)) return false;
  for (int32_t k = 0; k < tensor.ndim; ++k) {
    if (!word(tensor.shape[k]) || !word(tensor.strides[k])) return false;
  }
  return true;
}

// Describes a tuple of lists of tensors in words, word(w) each, and calls visit(tensor) after a tensor's words. False where
// either says so, and where something is no list, no plain tensor, or a tensor without memory of its own.
template <typename Word, typename Visit>
bool describe_all(const SpgPython& python, void* lists, Word word, Visit visit) {
  const int64_t count = python.tuple_size(lists);
  if (count < 0 || !word(count)) return false;
  for (int64_t l = 0; l < count; ++l) {
    void* list = python.tuple_item(lists, l);
    const int64_t length = python.list_size(list);
    if (length < 0 || !word(length)) return false;
    for (int64_t i = 0; i < length + AHEAD; ++i) {
      if (i + AHEAD < length) __builtin_prefetch(python.list_item(list, i + AHEAD));
      if (i < length) {
        // After a pass over a model its tensors' records are in no cache. A record is what a tensor object points to behind
        // its header; were it elsewhere, no more than the hint would be lost.
        void* object = python.list_item(list, i);
        if (!is_plain(python, object)) return false;
        const char* record = static_cast<const char* const*>(object)[2];
        for (int64_t line = 0; line < 3; ++line) __builtin_prefetch(record + 64 * line);
      }
      if (i < AHEAD) continue;
      DLTensor tensor;
      if (python.describe(python.list_item(list, i - AHEAD), &tensor)) return false;
      if (!describe(tensor, word) || !visit(tensor)) return false;
    }
  }
  return true;
}

bool has_memory(const DLTensor& tensor) {
  for (int32_t k = 0; k < tensor.ndim; ++k) {
    if (tensor.shape[k] == 0) return true;  // all that it needs
  }
  return tensor.data;
}

}  // namespace

int64_t spg_describe_tensors(const SpgPython* python, void* lists, int64_t* words) {
  int64_t used = 0;
  const auto keep = [&](int64_t word) {
    if (words) words[used] = word;
    ++used;
    return true;
  };
  const bool whole = describe_all(*python, lists, keep, [](const DLTensor&) { return true; });
  if (!whole) python->clear_error();
  return whole ? used : -1;
}

int32_t spg_locate_tensors(const SpgPython* python, void* lists, const int64_t* words, uint64_t* addresses) {
  const auto is_next = [&](int64_t word) { return word == *words++; };
  const bool alike = describe_all(*python, lists, is_next, [&](const DLTensor& tensor) {
    *addresses++ = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
    return has_memory(tensor);
  });
  if (!alike) python->clear_error();
  return alike;
}

void spg_read_floats(int64_t n, const float* const* at, float* values) {
  for (int64_t i = 0; i < n; ++i) values[i] = *at[i];
}

void spg_increment_floats(int64_t n, float* const* at) {
  for (int64_t i = 0; i < n; ++i) ++*at[i];
}
