// Memory for what a step computes in between.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace vivace {

// Memory that grows and never shrinks; what it held is lost when it grows. Aligned to 64 bytes.
template <class T>
class Buffer {
 public:
  void reserve(size_t count) {
    if (count <= count_) return;
    memory_.reset();
    count_ = 0;  // if there is no memory
    memory_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
    count_ = count;
  }
  T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t count_ = 0;
};

}  // namespace vivace
