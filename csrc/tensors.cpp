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

constexpr int64_t HEADER = 3;  // words of a description before shape and strides
constexpr int64_t AHEAD = 8;   // tensors

void describe(const DLTensor& tensor, int64_t header[HEADER]) {
  header[0] = static_cast<int64_t>(tensor.device.type) << 32 | static_cast<uint32_t>(tensor.device.id);
  header[1] = static_cast<int64_t>(tensor.dtype.lanes) << 16 | tensor.dtype.code << 8 | tensor.dtype.bits;
  header[2] = tensor.ndim;
}

bool is_plain(const SpgPython& python, void* object) {
  void* type = python.type_of(object);
  python.release(type);
  return type == python.tensor_type || type == python.parameter_type;
}

// Calls visit(tensor) for every tensor of a tuple of lists, in order. False where it says so, and where something is no list,
// no plain tensor, or a tensor without memory of its own.
template <typename Visit>
bool visit_all(const SpgPython& python, void* lists, Visit visit) {
  for (int64_t l = 0, count = python.tuple_size(lists); l < count; ++l) {
    void* list = python.tuple_item(lists, l);
    const int64_t length = python.list_size(list);
    if (length < 0) return false;
    for (int64_t i = 0; i < length + AHEAD; ++i) {
      if (i + AHEAD < length) __builtin_prefetch(python.list_item(list, i + AHEAD));
      if (i < length) {
        // After a pass over a model its tensors' records are in no cache. A record is what a tensor object points to behind its
        // header; were it elsewhere, no more than the hint would be lost.
        void* object = python.list_item(list, i);
        if (!is_plain(python, object)) return false;
        const char* record = static_cast<const char* const*>(object)[2];
        for (int64_t line = 0; line < 3; ++line) __builtin_prefetch(record + 64 * line);
      }
      DLTensor tensor;
      if (i >= AHEAD && (python.describe(python.list_item(list, i - AHEAD), &tensor) || !visit(tensor))) return false;
    }
  }
  return true;
}

}  // namespace

int64_t spg_describe_tensors(const SpgPython* python, void* lists, int64_t* words) {
  int64_t used = 0;
  const bool whole = visit_all(*python, lists, [&](const DLTensor& tensor) {
    if (words) {
      describe(tensor, words);
      words += HEADER;
      for (int32_t k = 0; k < tensor.ndim; ++k) {
        *words++ = tensor.shape[k];
        *words++ = tensor.strides[k];
      }
    }
    used += HEADER + 2 * tensor.ndim;
    return true;
  });
  if (!whole) python->clear_error();
  return whole ? used : -1;
}

int32_t spg_locate_tensors(const SpgPython* python, void* lists, const int64_t* words, uint64_t* addresses) {
  const bool alike = visit_all(*python, lists, [&](const DLTensor& tensor) {
    int64_t header[HEADER];
    describe(tensor, header);
    for (int64_t k = 0; k < HEADER; ++k) {
      if (header[k] != words[k]) return false;
    }
    words += HEADER;
    bool has_memory = tensor.data;
    for (int32_t k = 0; k < tensor.ndim; ++k, words += 2) {
      if (words[0] != tensor.shape[k] || words[1] != tensor.strides[k]) return false;
      has_memory |= tensor.shape[k] == 0;  // all that it needs
    }
    if (!has_memory) return false;
    *addresses++ = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
    return true;
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
