// Stand-ins while the vector engines are being built; each goes when its strip_<isa>.cpp lands.
#include "cpu/strip_engine.h"

namespace longctx::cpu {
const StripEngine& amx_engine(DType dtype) { return avx512_engine(dtype); }
}  // namespace longctx::cpu
