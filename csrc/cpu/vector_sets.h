// No include guard: includes the file named by the macro GDD_FAST_KERNELS once for AVX-512 and once for AVX2, each in
// its own namespace, with these macros. A target attribute allows instructions that the rest of a file must not use,
// and a template's attribute cannot depend on its argument.
//
//   GDD_FAST_ISA                    the attribute of every function there
//   GDD_FAST_VECTOR                 vector type, GDD_FAST_MM(name) the intrinsic of that name for it
//   GDD_FAST_EITHER(avx512, avx2)   the one of the two that is for this set

namespace avx512 {
#define GDD_FAST_ISA __attribute__((target("avx512f")))
#define GDD_FAST_VECTOR __m512
#define GDD_FAST_MM(name) _mm512_##name
#define GDD_FAST_EITHER(avx512, avx2) avx512
#include GDD_FAST_KERNELS
#undef GDD_FAST_ISA
#undef GDD_FAST_VECTOR
#undef GDD_FAST_MM
#undef GDD_FAST_EITHER
}  // namespace avx512

namespace avx2 {
#define GDD_FAST_ISA __attribute__((target("avx2,fma")))
#define GDD_FAST_VECTOR __m256
#define GDD_FAST_MM(name) _mm256_##name
#define GDD_FAST_EITHER(avx512, avx2) avx2
#include GDD_FAST_KERNELS
#undef GDD_FAST_ISA
#undef GDD_FAST_VECTOR
#undef GDD_FAST_MM
#undef GDD_FAST_EITHER
}  // namespace avx2
