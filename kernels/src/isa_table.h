// The entry points that each instruction set provides.
#ifndef FAASMOE_ISA_TABLE_H
#define FAASMOE_ISA_TABLE_H

#include "faasmoe_kernels.h"

namespace fk {

struct Isa {
  const char *name;
  int32_t (*linear)(const fk_matrix &, const void *, int32_t, int64_t, int64_t, void *, int32_t,
                    int64_t, int32_t);
  int32_t (*experts)(const fk_matrix *, const fk_matrix *, const fk_gating &, const fk_pairs &,
                     const void *, int32_t, int64_t, int64_t, int32_t, void *, int32_t, int64_t, int32_t);
};

}  // namespace fk

extern const fk::Isa fk_isa_portable;
#if defined(FK_WITH_X86)
extern const fk::Isa fk_isa_avx2, fk_isa_avx512, fk_isa_avx512_bf16;
#endif
#if defined(FK_WITH_NEON)
extern const fk::Isa fk_isa_neon;
#endif
#endif
