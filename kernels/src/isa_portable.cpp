#define FK_NAMESPACE fk_portable
#define FK_LANES 4
#define FK_FLOAT_ROWS 4
#define FK_FLOAT_COLUMNS 2
#define FK_INTEGER_ROWS 4
#define FK_INTEGER_COLUMNS 1
#include "kernels_impl.h"
#include "router_ops_impl.h"
#include "impl_draw.h"
#include "isa_table.h"

const fk::Isa fk_isa_portable = {"portable", fk_portable::linear, fk_portable::experts};
const fk::RouterOps fk_router_ops_portable = {fk_portable::attend, fk_portable::normalize, fk_portable::gate, fk_portable::add_scaled,
    fk_portable::multiply, fk_portable::find_highest, fk_portable::draw};
