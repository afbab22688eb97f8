// System headers of the kernels, read before any compiler target is set: what they define inline
// must stay runnable on every processor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "arguments.h"
#include "parallel.h"
