// A translation unit of its own, without PyTorch's headers: passes of the Gated DeltaNet.
#include "deltanet.h"

namespace qwen_fast {

template <typename T> void run_delta_net(const DeltaState& state, const DeltaTokens<T>& tokens, const Emit& emit) {
    DeltaPass<T>{state, tokens}.run(emit);
}
template void run_delta_net(const DeltaState&, const DeltaTokens<float>&, const Emit&);
template void run_delta_net(const DeltaState&, const DeltaTokens<BFloat16>&, const Emit&);

}  // namespace qwen_fast
