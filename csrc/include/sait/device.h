// What the ops ask the CUDA runtime beside launches. It is linked into this library, not shared with torch: the two meet
// in the driver, where streams and devices are the same.
#pragma once

#include <cstdint>
#include <string>

namespace sait::cuda {

int use_device(int32_t device);  // for this thread's next launches: 0, or the error
std::string error_text(int error);
int runtime_version();  // 13000 is CUDA 13.0
int driver_version();  // of CUDA that the installed driver serves; 0 where there is none

}  // namespace sait::cuda
