// The kernels for one instruction set. Included by src/isa_*.cpp, which define
//   FK_NAMESPACE        name of the enclosing namespace
//   FK_LANES            float32 lanes of a vector register
//   FK_FLOAT_ROWS       input rows that are multiplied at once, at most, in float32,
//   FK_FLOAT_COLUMNS    and weight rows by them
//   FK_INTEGER_ROWS     the same for integer weights
//   FK_INTEGER_COLUMNS
// and are compiled with that instruction set enabled. GCC's and Clang's vector extensions keep most
// of the source the same for all of them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "faasmoe_kernels.h"
#include "thread_pool.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FK_NAMESPACE {

#include "impl_vector.h"
#include "impl_panel.h"
#include "impl_float.h"
#include "impl_integer.h"
#include "impl_nibble.h"
#include "impl_fp8.h"
#include "impl_nvfp4.h"
#include "impl_product.h"
#include "impl_gating.h"
#include "impl_calls.h"

}  // namespace FK_NAMESPACE
