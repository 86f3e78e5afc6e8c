#define FK_NAMESPACE fk_avx512
#define FK_LANES 16
#define FK_FLOAT_ROWS 6
#define FK_FLOAT_COLUMNS 4
#define FK_INTEGER_ROWS 8
#define FK_INTEGER_COLUMNS 2
#include "kernels_impl.h"
#include "router_ops_impl.h"
#include "impl_draw.h"
#include "isa_table.h"

const fk::Isa fk_isa_avx512 = {"avx512", fk_avx512::linear, fk_avx512::experts};
const fk::RouterOps fk_router_ops_avx512 = {fk_avx512::attend, fk_avx512::normalize, fk_avx512::gate, fk_avx512::add_scaled,
    fk_avx512::multiply, fk_avx512::find_highest, fk_avx512::draw};
