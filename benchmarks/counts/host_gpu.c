// A libcuda.so.1 without a GPU: every call that Triton's launcher or the extension's makes succeeds and nothing runs.
// Launches are counted, and shown to `gdd_watcher` if somebody set it (host_gpu.py).
#include <cuda.h>

long gdd_launches = 0;
void (*gdd_watcher)(void* function, const unsigned* grid, unsigned threads, unsigned shared, void** params) = 0;

// As in CUDA, a thread has none until it asks for one.
static _Thread_local CUcontext current_context = 0;

CUresult cuLaunchKernel(CUfunction f, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** params,
                        void** extra) {
  if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
  const unsigned grid[3] = {grid_x, grid_y, grid_z};
  gdd_launches++;
  if (gdd_watcher) gdd_watcher(f, grid, block_x * block_y * block_z, shared, params);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, params, extra);
}

// Every module is another, so that kernels can be told apart.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  static unsigned long long made = 0;
  *module = (CUmodule)(++made * 16);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  *f = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// Those of an H100 that are asked for.
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 65536;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current_context;
  return CUDA_SUCCESS;
}

// This one and cuModuleUnload: Triton 3.8's.
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

// Triton 3.9's.
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current_context = context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)16;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "an error of the stub";
  return CUDA_SUCCESS;
}

#define SUCCEEDS(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
SUCCEEDS(cuDeviceGet, CUdevice* device, int ordinal)
SUCCEEDS(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache config)
SUCCEEDS(cuFuncSetAttribute, CUfunction f, CUfunction_attribute which, int value)
SUCCEEDS(cuCtxGetLimit, size_t* value, CUlimit limit)
SUCCEEDS(cuCtxSetLimit, CUlimit limit, size_t value)
SUCCEEDS(cuModuleUnload, CUmodule module)
SUCCEEDS(cuDriverGetVersion, int* version)
SUCCEEDS(cuPointerGetAttributes, unsigned count, CUpointer_attribute* which, void** data, CUdeviceptr pointer)
