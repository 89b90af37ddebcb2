// What Python sees as vivace.errors.NativeError.
#pragma once

#include <stdexcept>
#include <string>

namespace vivace {

class NativeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace vivace
