// A CUDA device without silicon: the host side of CUDA 13 for one GPU whose kernels do nothing.
//
// Preloaded as libcuda.so.1, it takes the place of CUDA's driver and runtime, of NCCL and of what PyTorch calls of
// cuBLAS. It refuses what CUDA's documentation says CUDA would refuse, hands out address space as device memory, and
// writes a line to the trace for everything that a GPU would have to do. run.py builds it and says what it is for.
//
// NULLCUDA_ARCH     compute capability, 90 by default
// NULLCUDA_MEMORY   bytes of device memory, those of an 80 GB H100 by default
// NULLCUDA_DEVICES  number of devices, 1 by default
// NULLCUDA_TRACE    file to which the trace is appended; a line is words separated by tabs, the first of them:
//                   kernel          a launch: name, grid, block, bytes of shared memory; ATen's elementwise kernels
//                                   end with the number of their elements
//                   triton          the same of Triton's kernels, which end with bytes of stack
//                   gemm            a matrix product: function, transposes, m,n,k, batch, types of a,b,d
//                   memcpy, memset  direction (and "pageable", which waits on a GPU), bytes
//                   sync            a call for which the host waits
//                   nccl            a collective: name, elements, type
//                   loaded          a new kernel of Triton: name, registers, bytes of stack
//                   tensormap       a tensor map of TMA: type, rank, first two dims, their boxes, swizzle
//                   malloc, free, hostalloc   bytes, 0 or the error
//                   mark            what the traced program says through nullcuda_mark
//                   ... INVALID     last, where CUDA would refuse the call; UNSUPPORTED: the null device cannot do it
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver_types.h" // of the wheel nvidia-cuda-runtime: structs that the runtime fills

#define EXPORT __attribute__((visibility("default")))
// A call that has nothing to do. Its arguments go unread, which the calling conventions of Linux allow.
#define ACCEPT(name) EXPORT int name(void) { return OK; }
// A call whose only result is *pointer.
#define RETURN(pointer, value) return *(pointer) = (value), OK

// As in cudaError_t, CUresult and cublasStatus_t.
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, INVALID_CONFIGURATION = 9, CUBLAS_NOT_SUPPORTED = 15, INVALID_DEVICE = 101,
       INVALID_IMAGE = 200, FILE_NOT_FOUND = 301, NOT_SUPPORTED = 801 };

static size_t number(const char *variable, size_t otherwise) {
  const char *text = getenv(variable);
  return text ? strtoull(text, 0, 10) : otherwise;
}
static int capability(void) { return number("NULLCUDA_ARCH", 90); }
static int devices(void) { return number("NULLCUDA_DEVICES", 1); }
static size_t total_memory(void) { return number("NULLCUDA_MEMORY", 85029158912ull); }
static const size_t taken_by_cuda = 700000000; // of a GPU's memory, before the first allocation

// Bytes of shared memory that a block can have (CUDA C++ Programming Guide, "Compute Capabilities").
static long most_shared(void) {
  int c = capability();
  return c == 80 ? 163 << 10 : c < 90 || c >= 120 ? 99 << 10 : 227 << 10;
}

// ---- trace ----

static FILE *trace;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // of everything static below

static void say(const char *format, ...) {
  va_list list;
  pthread_mutex_lock(&lock);
  if (!trace) {
    const char *path = getenv("NULLCUDA_TRACE");
    trace = fopen(path ? path : "/dev/null", "a");
  }
  va_start(list, format);
  vfprintf(trace, format, list);
  va_end(list);
  fputc('\n', trace);
  pthread_mutex_unlock(&lock);
}

EXPORT void nullcuda_mark(const char *label) {
  say("mark\t%s", label);
  fflush(trace);
}

// ---- memory: address space without pages until something touches them ----

enum { HOST = 1, DEVICE = 2 }; // cudaMemoryType

typedef struct {
  char *begin;
  size_t size;
  int kind, device;
} Range;

static __thread int device;
static Range *ranges;
static size_t num_ranges, room_for_ranges, in_use;

static Range *find(const void *p) {
  for (size_t i = 0; i < num_ranges; i++)
    if ((char *)p >= ranges[i].begin && (char *)p < ranges[i].begin + ranges[i].size) return &ranges[i];
  return 0;
}

static int kind_of(const void *p) {
  pthread_mutex_lock(&lock);
  Range *range = find(p);
  int kind = range ? range->kind : 0;
  pthread_mutex_unlock(&lock);
  return kind;
}

static int reserve(void **out, size_t size, int kind) {
  size = (size + 4095) & ~4095ull;
  pthread_mutex_lock(&lock);
  int full = kind == DEVICE && in_use + size > total_memory() - taken_by_cuda;
  if (!full) {
    *out = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    full = *out == MAP_FAILED;
  }
  if (!full) {
    if (num_ranges == room_for_ranges)
      ranges = realloc(ranges, (room_for_ranges = 2 * room_for_ranges + 64) * sizeof(Range));
    ranges[num_ranges++] = (Range){*out, size, kind, device};
    if (kind == DEVICE) in_use += size;
  }
  pthread_mutex_unlock(&lock);
  if (full) *out = 0;
  return full ? NO_MEMORY : OK;
}

static int release(void *p) {
  if (!p) return OK;
  pthread_mutex_lock(&lock);
  Range *range = find(p);
  if (range) {
    munmap(range->begin, range->size);
    if (range->kind == DEVICE) in_use -= range->size;
    *range = ranges[--num_ranges];
  }
  pthread_mutex_unlock(&lock);
  return range ? OK : INVALID;
}

EXPORT int cudaMalloc(void **p, size_t size) {
  int error = reserve(p, size, DEVICE);
  say("malloc\t%zu\t%d", size, error);
  return error;
}
EXPORT int cudaMallocAsync(void **p, size_t size, void *stream) { return cudaMalloc(p, size); }
EXPORT int cudaFree(void *p) {
  if (p) say("free");
  return release(p);
}
EXPORT int cudaFreeAsync(void *p, void *stream) { return cudaFree(p); }
EXPORT int cudaHostAlloc(void **p, size_t size, unsigned flags) {
  say("hostalloc\t%zu", size);
  return reserve(p, size, HOST);
}
EXPORT int cudaFreeHost(void *p) { return release(p); }
ACCEPT(cudaHostRegister)
ACCEPT(cudaHostUnregister)
EXPORT int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = total_memory();
  RETURN(available, *total - taken_by_cuda - in_use);
}
EXPORT int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&lock);
  Range *range = find(p);
  a->type = range ? range->kind : 0;
  a->device = range ? range->device : -2;
  if (range) a->devicePointer = (void *)p;
  if (range && range->kind == HOST) a->hostPointer = (void *)p;
  pthread_mutex_unlock(&lock);
  return OK;
}

// Small copies are made, so that indices, starts of documents and scalars are what they should be; large ones would
// touch pages for nothing.
static void copy(void *to, const void *from, size_t size) {
  if (size <= 4 << 20) memcpy(to, from, size);
}
static const char *directions[] = {"HtoH", "HtoD", "DtoH", "DtoD"};
static int direction(const void *to, const void *from, int kind) { // kind: cudaMemcpyKind, 4 for "find out"
  return kind != 4 ? kind : (kind_of(from) == DEVICE ? 2 : 0) + (kind_of(to) == DEVICE ? 1 : 0);
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  say("sync\tcudaMemcpy %s\t%zu", directions[direction(to, from, kind)], size);
  copy(to, from, size);
  return OK;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  kind = direction(to, from, kind);
  int pinned = kind == 1 ? kind_of(from) : kind == 2 ? kind_of(to) : 1;
  say("memcpy\t%s%s\t%zu", directions[kind], pinned ? "" : " pageable", size);
  copy(to, from, size);
  return OK;
}
ACCEPT(cudaMemcpyPeerAsync)
ACCEPT(cudaMemcpyToSymbol)
ACCEPT(cudaMemset)
EXPORT int cudaMemsetAsync(void *p, int value, size_t size, void *stream) {
  say("memset\t\t%zu", size);
  return OK;
}
EXPORT int cudaGetSymbolAddress(void **p, const void *symbol) { return reserve(p, 4096, DEVICE); }

// ---- device: numbers of an H100 SXM, but for what NULLCUDA_ARCH changes ----

static int attribute(int number) { // cudaDeviceAttr and CUdevice_attribute, which agree
  switch (number) {
  case 1: case 2: case 3: return 1024; // threads of a block, its x, its y
  case 4: return 64;                   // its z
  case 5: return 2147483647;           // x of a grid
  case 6: case 7: return 65535;        // its y, its z
  case 8: return 49152;                // bytes of shared memory of a block that asks for no more
  case 9: return 65536;                // bytes of constant memory
  case 10: return 32;                  // threads of a warp
  case 12: case 82: return 65536;      // registers of a block, of a multiprocessor
  case 13: return 1980000;             // clock in kHz
  case 16: return 132;                 // multiprocessors
  case 36: return 2619000;             // memory clock in kHz
  case 37: return 5120;                // bits of the memory bus
  case 38: return 50 << 20;            // bytes of the L2 cache
  case 39: return 2048;                // threads of a multiprocessor
  case 106: return 32;                 // its blocks
  case 41: case 79: case 83: case 88: case 89: case 95: case 115: return 1; // unified addresses, priorities, ...
  case 75: return capability() / 10;
  case 76: return capability() % 10;
  case 81: return most_shared() + 1024; // of a multiprocessor
  case 97: return most_shared();        // of a block that asks for more
  default: return 0;
  }
}

EXPORT int cudaGetDeviceCount(int *n) { RETURN(n, devices()); }
EXPORT int cudaGetDevice(int *d) { RETURN(d, device); }
EXPORT int cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return INVALID_DEVICE;
  device = d;
  return OK;
}
ACCEPT(cudaGetLastError)
ACCEPT(cudaPeekAtLastError)
EXPORT const char *cudaGetErrorName(int error) { return "nullcuda error"; }
EXPORT const char *cudaGetErrorString(int error) { return error == NO_MEMORY ? "out of memory" : "nullcuda error"; }
EXPORT int cudaDriverGetVersion(int *version) { RETURN(version, 13000); }
EXPORT int cudaRuntimeGetVersion(int *version) { RETURN(version, 13000); }
EXPORT int cudaDeviceGetAttribute(int *value, int number, int d) { RETURN(value, attribute(number)); }
EXPORT int cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (null)");
  p->totalGlobalMem = total_memory();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = most_shared();
  p->sharedMemPerMultiprocessor = most_shared() + 1024;
  p->reservedSharedMemPerBlock = 1024;
  p->totalConstMem = 65536;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->managedMemory = p->concurrentKernels = 1;
  p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
  return OK;
}
EXPORT int cudaDeviceGetPCIBusId(char *out, int size, int d) {
  snprintf(out, size, "0000:00:00.0");
  return OK;
}
EXPORT int cudaDeviceCanAccessPeer(int *can, int d, int other) { RETURN(can, 0); }
ACCEPT(cudaDeviceEnablePeerAccess)
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  RETURN(greatest, -5);
}
EXPORT int cudaDeviceGetDefaultMemPool(void **pool, int d) { RETURN(pool, (void *)1); }
ACCEPT(cudaDeviceGetGraphMemAttribute)
ACCEPT(cudaDeviceSetGraphMemAttribute)
EXPORT int cudaDeviceSynchronize(void) {
  say("sync\tcudaDeviceSynchronize");
  return OK;
}
ACCEPT(cudaProfilerStart)
ACCEPT(cudaProfilerStop)

// ---- streams and events: all is done as soon as it is asked for ----

EXPORT int cudaStreamCreate(void **stream) { RETURN(stream, malloc(8)); }
EXPORT int cudaStreamCreateWithFlags(void **stream, unsigned flags) { RETURN(stream, malloc(8)); }
EXPORT int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { RETURN(stream, malloc(8)); }
ACCEPT(cudaStreamDestroy)
ACCEPT(cudaStreamQuery)
EXPORT int cudaStreamGetPriority(void *stream, int *priority) { RETURN(priority, 0); }
EXPORT int cudaStreamSynchronize(void *stream) {
  say("sync\tcudaStreamSynchronize");
  return OK;
}
ACCEPT(cudaStreamWaitEvent)
EXPORT int cudaStreamIsCapturing(void *stream, int *status) { RETURN(status, 0); }
EXPORT int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
  if (id) *id = 0;
  RETURN(status, 0);
}
ACCEPT(cudaThreadExchangeStreamCaptureMode)
EXPORT int cudaStreamAddCallback(void *stream, void (*f)(void *, int, void *), void *data, unsigned flags) {
  f(stream, OK, data);
  return OK;
}
EXPORT int cudaLaunchHostFunc(void *stream, void (*f)(void *), void *data) {
  f(data);
  return OK;
}
EXPORT int cudaEventCreate(void **event) { RETURN(event, malloc(8)); }
EXPORT int cudaEventCreateWithFlags(void **event, unsigned flags) { RETURN(event, malloc(8)); }
EXPORT int cudaEventDestroy(void *event) {
  free(event);
  return OK;
}
ACCEPT(cudaEventQuery)
ACCEPT(cudaEventRecord)
ACCEPT(cudaEventRecordWithFlags)
EXPORT int cudaEventSynchronize(void *event) {
  say("sync\tcudaEventSynchronize");
  return OK;
}
EXPORT int cudaEventElapsedTime(float *ms, void *begin, void *end) { RETURN(ms, 1); }

// ---- kernels compiled into libraries: nvcc's code registers each by the address of its host stub ----

typedef struct {
  const void *stub;
  const char *name;
} Entry;

static Entry *entries;
static size_t num_entries, room_for_entries, num_sorted;

EXPORT void **__cudaRegisterFatBinary(void *binary) { return malloc(8); }
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT void __cudaRegisterVar(void **handle) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *stub, char *device_name, const char *name) {
  pthread_mutex_lock(&lock);
  if (num_entries == room_for_entries)
    entries = realloc(entries, (room_for_entries = 2 * room_for_entries + 4096) * sizeof(Entry));
  entries[num_entries++] = (Entry){stub, strdup(name)};
  pthread_mutex_unlock(&lock);
}

static int by_stub(const void *a, const void *b) {
  const char *x = ((Entry *)a)->stub, *y = ((Entry *)b)->stub;
  return (x > y) - (x < y);
}
static const char *name_of(const void *stub) {
  pthread_mutex_lock(&lock);
  if (num_sorted != num_entries) {
    qsort(entries, num_entries, sizeof(Entry), by_stub);
    num_sorted = num_entries;
  }
  Entry key = {stub, 0}, *found = bsearch(&key, entries, num_entries, sizeof(Entry), by_stub);
  const char *name = found ? found->name : "?";
  pthread_mutex_unlock(&lock);
  return name;
}

typedef struct {
  unsigned x, y, z;
} Dim;

// Refuses what "Compute Capabilities" of the CUDA C++ Programming Guide does not allow.
static int launch(const char *kind, const char *name, Dim grid, Dim block, size_t shared, int more) {
  unsigned long threads = (unsigned long)block.x * block.y * block.z;
  int bad = (long)shared > most_shared() || !grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 ||
            grid.z > 65535 || !threads || threads > 1024 || block.z > 64;
  say("%s\t%s\t%u,%u,%u\t%u,%u,%u\t%zu\t%d%s", kind, name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
      more, bad ? "\tINVALID" : "");
  return bad ? INVALID_CONFIGURATION : OK;
}
static int launch_stub(const void *stub, Dim grid, Dim block, size_t shared, void **args) {
  const char *name = name_of(stub);
  int elements = strstr(name, "elementwise_kernel") ? *(int *)args[0] : 0; // of ATen, whose first argument it is
  return launch("kernel", name, grid, block, shared, elements);
}
EXPORT int cudaLaunchKernel(const void *stub, Dim grid, Dim block, void **args, size_t shared, void *stream) {
  return launch_stub(stub, grid, block, shared, args);
}
EXPORT int __cudaGetKernel(void **kernel, const void *stub) { RETURN(kernel, (void *)stub); }
EXPORT int __cudaLaunchKernel(void *kernel, Dim grid, Dim block, void **args, size_t shared, void *stream) {
  return launch_stub(kernel, grid, block, shared, args);
}
EXPORT int cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *stub, void **args) {
  Dim grid = {c->gridDim.x, c->gridDim.y, c->gridDim.z}, block = {c->blockDim.x, c->blockDim.y, c->blockDim.z};
  return launch_stub(stub, grid, block, c->dynamicSmemBytes, args);
}

// What stands between <<< and >>> waits here for the stub to fetch it.
typedef struct {
  Dim grid, block;
  size_t shared;
  void *stream;
} Call;
static __thread Call calls[16];
static __thread int depth;
EXPORT unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void *stream) {
  calls[depth++] = (Call){grid, block, shared, stream};
  return OK;
}
EXPORT int __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
  Call *call = &calls[--depth];
  *grid = call->grid;
  *block = call->block;
  *shared = call->shared;
  RETURN(stream, call->stream);
}

enum { MAX_DYNAMIC_SHARED_SIZE = 8 }; // cudaFuncAttribute, CUfunction_attribute
EXPORT int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
  memset(a, 0, sizeof *a);
  a->binaryVersion = a->ptxVersion = capability();
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->maxDynamicSharedSizeBytes = most_shared();
  return OK;
}
EXPORT int cudaFuncSetAttribute(const void *stub, int number, int value) {
  return number == MAX_DYNAMIC_SHARED_SIZE && value > most_shared() ? INVALID : OK;
}
ACCEPT(cudaKernelSetAttributeForDevice)
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { RETURN(n, 2); }

// ---- kernels of Triton: the driver loads their cubins, which are ELF files ----

typedef struct {
  char name[480];
  int registers, stack;
} Function;

ACCEPT(cuInit)
EXPORT int cuDriverGetVersion(int *version) { RETURN(version, 13000); }
EXPORT int cuDeviceGetCount(int *n) { RETURN(n, devices()); }
EXPORT int cuDeviceGet(int *d, int index) { RETURN(d, index); }
EXPORT int cuDeviceGetAttribute(int *value, int number, int d) { RETURN(value, attribute(number)); }
EXPORT int cuDevicePrimaryCtxRetain(void **context, int d) { RETURN(context, (void *)1); }
EXPORT int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) {
  *flags = 0;
  RETURN(active, 1);
}
EXPORT int cuCtxGetCurrent(void **context) { RETURN(context, (void *)1); }
ACCEPT(cuCtxSetCurrent)
EXPORT int cuCtxGetDevice(int *d) { RETURN(d, device); }
ACCEPT(cuCtxSetLimit)
EXPORT int cuCtxGetLimit(size_t *value, int limit) { RETURN(value, 0); }
EXPORT int cuGetErrorString(int error, const char **text) { RETURN(text, "nullcuda: driver error"); }
EXPORT int cuPointerGetAttribute(void *out, int number, unsigned long long p) { // CUpointer_attribute
  switch (number) {
  case 1: RETURN((void **)out, (void *)1); // context
  case 2:                                  // kind of memory
    *(unsigned *)out = kind_of((void *)p);
    return *(unsigned *)out ? OK : INVALID;
  case 3: RETURN((unsigned long long *)out, p); // address on the device
  case 9: RETURN((int *)out, device);
  default: return INVALID;
  }
}

static size_t elf_size(const char *image) {
  const Elf64_Ehdr *h = (void *)image;
  size_t sections = h->e_shoff + (size_t)h->e_shnum * h->e_shentsize;
  size_t segments = h->e_phoff + (size_t)h->e_phnum * h->e_phentsize;
  return sections > segments ? sections : segments;
}
EXPORT int cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, ELFMAG, 4)) {
    say("UNSUPPORTED\ta module that is no cubin");
    return INVALID_IMAGE;
  }
  *module = malloc(elf_size(image));
  memcpy(*module, image, elf_size(image));
  return OK;
}
EXPORT int cuModuleLoadDataEx(void **module, const void *image) { return cuModuleLoadData(module, image); }
EXPORT int cuModuleLoad(void **module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t size = ftell(file);
  rewind(file);
  char *data = malloc(size);
  int error = fread(data, 1, size, file) == size ? cuModuleLoadData(module, data) : FILE_NOT_FOUND;
  fclose(file);
  free(data);
  return error;
}
ACCEPT(cuModuleUnload)

// Registers and stack of a function, which its cubin has in the section .nv.info: entries of format (1 byte), what (1),
// size (2), and, in format 4, a value of that size: here the number of a symbol (4) and a count (4).
enum { FORMAT_SIZED = 4, FRAME_SIZE = 0x11, REGISTER_COUNT = 0x2f };
static void read_info(const char *image, Function *f) {
  const Elf64_Ehdr *header = (void *)image;
  const Elf64_Shdr *sections = (void *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset, *strings = 0;
  const Elf64_Sym *symbols = 0;
  size_t num_symbols = 0;
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) {
      symbols = (void *)(image + sections[i].sh_offset);
      num_symbols = sections[i].sh_size / sizeof(Elf64_Sym);
      strings = image + sections[sections[i].sh_link].sh_offset;
    }
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, ".nv.info")) continue;
    const unsigned char *p = (void *)(image + sections[i].sh_offset), *end = p + sections[i].sh_size;
    while (p + 4 <= end) {
      int format = p[0], what = p[1], size = p[2] | p[3] << 8;
      p += 4;
      if (format != FORMAT_SIZED) continue;
      uint32_t symbol, value;
      memcpy(&symbol, p, 4);
      memcpy(&value, p + 4, 4);
      if (size == 8 && symbol < num_symbols && !strcmp(strings + symbols[symbol].st_name, f->name)) {
        if (what == REGISTER_COUNT) f->registers = value;
        if (what == FRAME_SIZE) f->stack = value;
      }
      p += size;
    }
  }
}
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  Function *f = calloc(1, sizeof *f);
  snprintf(f->name, sizeof f->name, "%s", name);
  read_info(module, f);
  say("loaded\t%s\t%d\t%d", f->name, f->registers, f->stack);
  RETURN(function, f);
}
EXPORT int cuFuncGetAttribute(int *value, int number, Function *f) { // CUfunction_attribute
  switch (number) {
  case 0: RETURN(value, 1024); // threads of a block
  case 3: RETURN(value, f->stack);
  case 4: RETURN(value, f->registers);
  case 6: RETURN(value, capability());
  default: RETURN(value, 0);
  }
}
EXPORT int cuFuncSetAttribute(Function *f, int number, int value) {
  return number == MAX_DYNAMIC_SHARED_SIZE && value > most_shared() ? INVALID : OK;
}
ACCEPT(cuFuncSetCacheConfig)
EXPORT int cuOccupancyMaxActiveClusters(int *n, Function *f, const void *config) { RETURN(n, 132); }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, Function *f, int block, size_t shared) { RETURN(n, 1); }

typedef struct { // the beginning of CUlaunchConfig
  Dim grid, block;
  unsigned shared;
} Config;
EXPORT int cuLaunchKernelEx(const Config *c, Function *f, void **args, void **extra) {
  return launch("triton", f->name, c->grid, c->block, c->shared, f->stack);
}
EXPORT int cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void *stream, void **args, void **extra) {
  return launch("triton", f->name, (Dim){gx, gy, gz}, (Dim){bx, by, bz}, shared, f->stack);
}
EXPORT int cuLaunchCooperativeKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
    unsigned bz, unsigned shared, void *stream, void **args) {
  return launch("triton", f->name, (Dim){gx, gy, gz}, (Dim){bx, by, bz}, shared, f->stack);
}

// Refuses what the CUDA driver API's reference does not allow of tiled tensor maps.
EXPORT int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *dims,
    const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave, int swizzle) {
  static const int element_size[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; // CUtensorMapDataType
  static const int widest[] = {0, 32, 64, 128};                              // bytes, by swizzle
  int bad = rank < 1 || rank > 5 || (uintptr_t)address % 16, size = type < 13 ? element_size[type] : 1;
  for (unsigned i = 0; i < rank; i++)
    bad |= !dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8;
  for (unsigned i = 0; i + 1 < rank; i++) bad |= strides[i] % 16 || strides[i] >= 1ull << 40;
  if (!interleave) bad |= box[0] * size % 16 || (swizzle > 0 && swizzle < 4 && box[0] * size > widest[swizzle]);
  say("tensormap\t%d\t%u\t%llu,%llu\t%u,%u\tswizzle %d%s", type, rank, (long long)dims[0],
      rank > 1 ? (long long)dims[1] : 0, box[0], rank > 1 ? box[1] : 0, swizzle, bad ? "\tINVALID" : "");
  return bad ? INVALID : OK;
}
EXPORT int cuTensorMapEncodeIm2col(void) { return NOT_SUPPORTED; }
EXPORT int cuLogsRegisterCallback(void *f, void *data, void **handle) {
  if (handle) *handle = 0;
  return OK;
}
ACCEPT(cuLogsUnregisterCallback)

// How the runtime's users find functions of the driver. One that is not here says so when it is called.
static int unsupported(void) {
  say("UNSUPPORTED\ta function of the driver that the null device lacks");
  return NOT_SUPPORTED;
}
EXPORT int cudaGetDriverEntryPointByVersion(
    const char *symbol, void **f, unsigned version, unsigned long long flags, int *status) {
  *f = dlsym(RTLD_DEFAULT, symbol);
  if (!*f) {
    say("lacking\t%s", symbol);
    *f = (void *)unsupported;
  }
  if (status) *status = 0;
  return OK;
}

// ---- cuBLAS: matrix products are traced, those in FP8 checked ----

static int math_mode, pointer_mode;
EXPORT int cublasCreate_v2(void **handle) { RETURN(handle, calloc(1, 4096)); }
ACCEPT(cublasDestroy_v2)
ACCEPT(cublasSetStream_v2)
ACCEPT(cublasSetWorkspace_v2)
ACCEPT(cublasSetSmCountTarget)
EXPORT int cublasSetMathMode(void *handle, int mode) { RETURN(&math_mode, mode); }
EXPORT int cublasGetMathMode(void *handle, int *mode) { RETURN(mode, math_mode); }
EXPORT int cublasSetPointerMode_v2(void *handle, int mode) { RETURN(&pointer_mode, mode); }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { RETURN(mode, pointer_mode); }

enum { FLOAT32 = 0, FLOAT64 = 1, E4M3 = 28, E5M2 = 29 }; // cudaDataType
static int product(const char *function, int ta, int tb, long m, long n, long k, int a, int b, int d, long batch) {
  say("gemm\t%s\t%c%c\t%ld,%ld,%ld\t%ld\t%d,%d,%d", function, ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, batch, a, b, d);
  return OK;
}
EXPORT int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type,
    int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type) {
  return product("GemmEx", ta, tb, m, n, k, a_type, b_type, c_type, 1);
}
EXPORT int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
    const void *a, int a_type, int lda, long long stride_a, const void *b, int b_type, int ldb, long long stride_b,
    const void *beta, void *c, int c_type, int ldc, long long stride_c, int batch) {
  return product("GemmStridedBatchedEx", ta, tb, m, n, k, a_type, b_type, c_type, batch);
}
#define PRODUCT(letter, type)                                                                                         \
  EXPORT int cublas##letter##gemm_v2(void *handle, int ta, int tb, int m, int n, int k) {                             \
    return product(#letter "gemm", ta, tb, m, n, k, type, type, type, 1);                                             \
  }                                                                                                                   \
  EXPORT int cublas##letter##gemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k) {                  \
    return product(#letter "gemmStridedBatched", ta, tb, m, n, k, type, type, type, 2);                               \
  }                                                                                                                   \
  EXPORT int cublas##letter##gemv_v2(void *handle, int t, int m, int n) {                                             \
    return product(#letter "gemv", t, 0, m, 1, n, type, type, type, 1);                                               \
  }                                                                                                                   \
  EXPORT int cublas##letter##dot_v2(void *handle, int n) {                                                            \
    return product(#letter "dot", 0, 0, 1, 1, n, type, type, type, 1);                                                \
  }
PRODUCT(S, FLOAT32)
PRODUCT(D, FLOAT64)
EXPORT int cublasDotEx(void *handle, int n, const void *x, int type) {
  return product("DotEx", 0, 0, 1, 1, n, type, type, type, 1);
}

// cublasLt describes its operands by objects, which the real library fills and reads: only the products are ours.
typedef struct {
  uint32_t type;
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch;
} Layout;

static int get(const char *function, const void *object, int attribute, void *out, size_t size) {
  static void *library;
  if (!library) library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_NOLOAD);
  int (*f)(const void *, int, void *, size_t, size_t *) = library ? dlsym(library, function) : 0;
  size_t written = 0;
  return f ? f(object, attribute, out, size, &written) : NOT_SUPPORTED;
}
static Layout layout(const void *object) { // cublasLtMatrixLayoutAttribute_t
  Layout x = {0};
  const char *f = "cublasLtMatrixLayoutGetAttribute";
  get(f, object, 0, &x.type, sizeof x.type);
  get(f, object, 2, &x.rows, sizeof x.rows);
  get(f, object, 3, &x.cols, sizeof x.cols);
  get(f, object, 4, &x.ld, sizeof x.ld);
  get(f, object, 5, &x.batch, sizeof x.batch);
  return x;
}
typedef struct {
  int ta, tb;
  signed char fast; // sums in fewer than 32 bits
} Description;
static Description description(const void *object) { // cublasLtMatmulDescAttributes_t
  Description x = {0};
  const char *f = "cublasLtMatmulDescGetAttribute";
  get(f, object, 3, &x.ta, sizeof x.ta);
  get(f, object, 4, &x.tb, sizeof x.tb);
  get(f, object, 25, &x.fast, sizeof x.fast);
  return x;
}
static int eight_bits(uint32_t type) { return type == E4M3 || type == E5M2; }
// The cuBLAS documentation of cublasLtMatmul: FP8 on Ada and Hopper wants the first operand transposed and not the
// second; everywhere dims in multiples of 16, and not e5m2 twice.
static int check_fp8(Description x, Layout a, Layout b) {
  if (!eight_bits(a.type) && !eight_bits(b.type)) return OK;
  int bad = capability() < 89 || (a.type == E5M2 && b.type == E5M2);
  bad |= capability() < 100 && (!x.ta || x.tb);
  bad |= a.rows % 16 || a.cols % 16 || b.rows % 16 || b.cols % 16 || a.ld % 16 || b.ld % 16;
  return bad ? CUBLAS_NOT_SUPPORTED : OK;
}
typedef struct { // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Heuristic;
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d,
    void *preference, int wanted, Heuristic *out, int *found) {
  int error = check_fp8(description(desc), layout(a), layout(b));
  memset(out, 0, sizeof *out);
  out->state = error;
  out->waves = 1;
  *found = error ? 0 : 1;
  if (error) say("gemm\tltmatmul\tINVALID");
  return error;
}
EXPORT int cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,
    void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout) {
  Layout x = layout(a_layout), y = layout(b_layout), z = layout(d_layout);
  Description how = description(desc);
  int error = check_fp8(how, x, y);
  if (eight_bits(x.type) && ((uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % 16) error = CUBLAS_NOT_SUPPORTED;
  say("gemm\tltmatmul%s\t%c%c\t%lu,%lu,%lu\t%d\t%u,%u,%u%s", how.fast ? " fast" : "", how.ta ? 'T' : 'N',
      how.tb ? 'T' : 'N', z.rows, z.cols, how.ta ? x.rows : x.cols, z.batch, x.type, y.type, z.type,
      error ? "\tINVALID" : "");
  return error;
}
EXPORT int cublasLtMatmulAlgoCheck(
    void *handle, void *desc, void *a, void *b, void *c, void *d, const void *algorithm, Heuristic *out) {
  memset(out, 0, sizeof *out);
  return OK;
}

// ---- NCCL: collectives that move nothing ----

typedef struct {
  int ranks, rank;
} Comm;
typedef struct {
  char bytes[128];
} Id;

static int communicator(Comm **c, int ranks, int rank) {
  *c = malloc(sizeof **c);
  **c = (Comm){ranks, rank};
  return OK;
}
EXPORT int ncclGetVersion(int *version) { RETURN(version, 22907); }
EXPORT int ncclGetUniqueId(Id *id) {
  memset(id, 7, sizeof *id);
  return OK;
}
EXPORT int ncclCommInitRank(Comm **c, int ranks, Id id, int rank) { return communicator(c, ranks, rank); }
EXPORT int ncclCommInitRankConfig(Comm **c, int ranks, Id id, int rank) { return communicator(c, ranks, rank); }
EXPORT int ncclCommInitRankScalable(Comm **c, int ranks, int rank) { return communicator(c, ranks, rank); }
EXPORT int ncclCommCount(Comm *c, int *n) { RETURN(n, c->ranks); }
EXPORT int ncclCommUserRank(Comm *c, int *rank) { RETURN(rank, c->rank); }
ACCEPT(ncclCommDestroy)
ACCEPT(ncclCommAbort)
ACCEPT(ncclCommFinalize)
EXPORT int ncclCommGetAsyncError(Comm *c, int *error) { RETURN(error, OK); }
EXPORT int ncclCommRegister(Comm *c, void *p, size_t n, void **handle) { RETURN(handle, 0); }
ACCEPT(ncclCommDeregister)
EXPORT const char *ncclGetErrorString(int error) { return "nullcuda: NCCL error"; }
EXPORT const char *ncclGetLastError(Comm *c) { return ""; }
ACCEPT(ncclGroupStart)
ACCEPT(ncclGroupEnd)

static int collective(const char *name, size_t count, int type) {
  say("nccl\t%s\t%zu\t%d", name, count, type);
  return OK;
}
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type) { return collective("all_reduce", n, type); }
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type) {
  return collective("reduce_scatter", n, type);
}
EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type) { return collective("all_gather", n, type); }
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type) { return collective("broadcast", n, type); }
EXPORT int ncclBcast(void *p, size_t n, int type) { return collective("broadcast", n, type); }
EXPORT int ncclAlltoAll(const void *from, void *to, size_t n, int type) { return collective("all_to_all", n, type); }
EXPORT int ncclSend(const void *from, size_t n, int type) { return collective("send", n, type); }
EXPORT int ncclRecv(void *to, size_t n, int type) { return collective("receive", n, type); }
