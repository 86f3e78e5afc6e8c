#define FK_NAMESPACE fk_avx2
#define FK_LANES 8
#define FK_FLOAT_ROWS 6
#define FK_FLOAT_COLUMNS 2
#define FK_INTEGER_ROWS 4
#define FK_INTEGER_COLUMNS 1
#include "kernels_impl.h"
#include "router_ops_impl.h"
#include "impl_draw.h"
#include "isa_table.h"

const fk::Isa fk_isa_avx2 = {"avx2", fk_avx2::linear, fk_avx2::experts};
const fk::RouterOps fk_router_ops_avx2 = {fk_avx2::attend, fk_avx2::normalize, fk_avx2::gate, fk_avx2::add_scaled,
    fk_avx2::multiply, fk_avx2::find_highest, fk_avx2::draw};
