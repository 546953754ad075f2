#include "prefill_launch.cuh"

namespace jrt {
template const char* launch_prefill<__half>(const PrefillArguments&, const PrefillMaps&, PrefillParameters);
}  // namespace jrt
