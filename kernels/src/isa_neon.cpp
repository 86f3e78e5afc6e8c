#define FK_NAMESPACE fk_neon
#define FK_LANES 4
#define FK_FLOAT_ROWS 6
#define FK_FLOAT_COLUMNS 4
#define FK_INTEGER_ROWS 6
#define FK_INTEGER_COLUMNS 1
#include "kernels_impl.h"
#include "router_ops_impl.h"
#include "impl_draw.h"
#include "isa_table.h"

const fk::Isa fk_isa_neon = {"neon", fk_neon::linear, fk_neon::experts};
const fk::RouterOps fk_router_ops_neon = {fk_neon::attend, fk_neon::normalize, fk_neon::gate, fk_neon::add_scaled,
    fk_neon::multiply, fk_neon::find_highest, fk_neon::draw};
