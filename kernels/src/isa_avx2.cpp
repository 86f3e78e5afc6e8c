#define FK_NAMESPACE fk_avx2
#define FK_LANES 8
#define FK_COLUMNS_1 8
#define FK_COLUMNS 3
#define FK_MAX_ROWS 3
#include "kernels_impl.h"
#include "router_ops_impl.h"
#include "isa_table.h"

const fk::Isa fk_isa_avx2 = {"avx2", fk_avx2::linear, fk_avx2::experts};
const fk::RouterOps fk_router_ops_avx2 = {fk_avx2::attend, fk_avx2::normalize, fk_avx2::gate, fk_avx2::add_scaled};
