#include "prefill_launch.cuh"

namespace jrt {
template const char* launch_prefill<__nv_bfloat16>(const PrefillArguments&, const PrefillMaps&, PrefillParameters);
}  // namespace jrt
