// Joins the op library to the state that qkernels._host owns (see isa.h).
#include "isa.h"

extern "C" __attribute__((visibility("default"))) void qkernels_bind_isa(void* state) {
  qkernels::isa_state = static_cast<qkernels::IsaState*>(state);
}
