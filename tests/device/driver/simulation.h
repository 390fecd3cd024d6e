// What the parts of the simulated driver share: streams are queues of work, devices are memory that the host cannot
// touch, and one lock guards all of it.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace sim {

struct Stream;

// A point in a stream's work: what an event records.
struct Marker {
  Stream* stream;
  bool reached = false;
};

// One piece of queued work. It begins after `wait` is reached and sets `mark` when it is done.
struct Work {
  std::string what;
  std::function<void()> run = {};
  std::shared_ptr<Marker> wait = {}, mark = {};
};

struct Graph {
  std::vector<Work> work;
};

struct Stream {
  int device, priority;
  std::deque<Work> queue = {};
  // Whether a piece of its work is running, and in which thread; the next one must not begin in another then.
  bool running = false;
  std::thread::id runner = {};
  Graph* capture = nullptr;
  uint64_t capture_id = 0;
};

struct Event {
  int device;
  std::shared_ptr<Marker> marker = {};
};

// Device memory is one file mapped twice: at the addresses that the host sees without access, and at an alias that
// queued work uses. Ranges are first address → bytes.
struct Device {
  char *base, *alias;
  std::map<uintptr_t, size_t> live = {}, holes = {};
  size_t top = 0, used = 0;
  Stream* default_stream;
};

// When queued work runs: as it is queued; no sooner than something waits for it; or a random piece at each call.
enum Order { EAGER, LATE, RANDOM };

struct World {
  World();
  std::recursive_mutex mutex;
  int capability;
  size_t device_bytes;
  std::vector<Device> devices;
  // In the order in which they were made, so that a random order is the same for the same seed.
  std::vector<Stream*> streams;
  Order order = EAGER;
  std::mt19937_64 random;
  uint64_t next_capture = 1;
  // Host memory that is page-locked, the part of it that was registered, and unified memory.
  std::map<uintptr_t, size_t> locked, managed;
  std::set<uintptr_t> registered;
  int64_t locked_bytes = 0, lock_limit = -1;
  bool poison = true;
  std::unordered_map<std::string, int64_t> launches;
  // How often memory was asked for, of devices or locked.
  int64_t allocations = 0;
  // Told of each call that makes the host wait, and of each fault.
  void (*on_wait)(const char*) = nullptr;
  void (*on_fault)(const char*) = nullptr;
};

World& world();

// Holds the world's lock; may be nested.
class Lock {
 public:
  Lock();
  ~Lock();
};

// Gives the lock up, however deep it is held: for work that calls Python, which other threads may be in.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();

 private:
  int depth_;
};

extern thread_local int current_device;

// Remembers an error for cudaGetLastError.
cudaError_t failed(cudaError_t error);
void fault(const std::string& what);
void note_wait(const char* what);
int attribute(int which);

// The device an address belongs to, or -1; where queued work finds its bytes.
int device_of(const void* address);
char* alias_of(const void* address);
bool is_live(const void* address, size_t bytes);
bool is_locked(const void* address, size_t bytes);
bool is_managed(const void* address);
void check_live(const void* address, size_t bytes, const char* what);

// CUDA's handle to our stream: the legacy and per-thread ones are the current device's default.
Stream* stream_of(cudaStream_t handle);
void enqueue(Stream* stream, Work work);
// Runs a stream's work in order, up to and including what sets `until`; all of it without.
void drain(Stream* stream, const Marker* until = nullptr);
void drain_device(int device);
void drain_all();
// Lets a random stream do a random part of its work, in the random order.
void progress();
// Whether a stream captures in the mode that forbids `what` everywhere; notes the fault.
bool refused_in_capture(const char* what);

// Counts a launch, after the checks that the driver makes.
cudaError_t count_launch(const std::string& name, dim3 grid, dim3 block, cudaStream_t stream);

}  // namespace sim
