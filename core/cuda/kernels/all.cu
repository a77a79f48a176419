// One unit, so that one fat binary holds everything.
#include "attention.cu"
#include "backward.cu"
#include "forward.cu"
#include "learn.cu"
