// Stand-ins while the vector engines are being built; each goes when its strip_<isa>.cpp lands.
#include "cpu/strip_engine.h"

namespace longctx::cpu {
const StripEngine& avx2_engine(DType dtype) { return generic_engine(dtype); }
const StripEngine& avx512_engine(DType dtype) { return generic_engine(dtype); }
}  // namespace longctx::cpu
