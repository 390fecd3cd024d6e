// The one world: its devices as the environment describes them, its lock, its faults, and what Python asks of it.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "simulation.h"

namespace sim {

namespace {

// Settings that must be known before any code runs: SIM_DEVICES, SIM_CAPABILITY (75 is a T4), SIM_BYTES of a device.
int64_t setting(const char* name, int64_t otherwise) {
  const char* value = getenv(name);
  return value ? atoll(value) : otherwise;
}

Device make_device(int number, size_t bytes) {
  int file = memfd_create("simulated-device", 0);
  // Sparse: only what is touched takes memory.
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    perror("simulated device");
    abort();
  }
  // About where real device pointers lie.
  auto* wanted = reinterpret_cast<char*>(0x700000000000 + number * 0x10000000000);
  void* base = mmap(wanted, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0);
  void* alias = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED || alias == MAP_FAILED) {
    perror("simulated device");
    abort();
  }
  close(file);
  return {static_cast<char*>(base), static_cast<char*>(alias), {}, {}, 0, 0, new Stream{number, 0}};
}

thread_local int lock_depth = 0;

}  // namespace

World::World()
    : capability(static_cast<int>(setting("SIM_CAPABILITY", 86))),
      device_bytes(static_cast<size_t>(setting("SIM_BYTES", 24LL << 30))) {
  int count = static_cast<int>(setting("SIM_DEVICES", 2));
  for (int number = 0; number < count; number++) {
    devices.push_back(make_device(number, device_bytes));
    streams.push_back(devices.back().default_stream);
  }
}

World& world() {
  // Never destroyed: torch's own destructors call the driver.
  static World* only = new World;
  return *only;
}

Lock::Lock() {
  world().mutex.lock();
  lock_depth++;
}

Lock::~Lock() {
  lock_depth--;
  world().mutex.unlock();
}

Unlocked::Unlocked() : depth_(lock_depth) {
  for (int i = 0; i < depth_; i++) world().mutex.unlock();
  lock_depth = 0;
}

Unlocked::~Unlocked() {
  for (int i = 0; i < depth_; i++) world().mutex.lock();
  lock_depth = depth_;
}

void fault(const std::string& what) {
  if (world().on_fault)
    world().on_fault(what.c_str());
  else
    fprintf(stderr, "fault on the simulated device: %s\n", what.c_str());
}

void note_wait(const char* what) {
  if (!world().on_wait) return;
  Unlocked unlocked;
  world().on_wait(what);
}

}  // namespace sim

using namespace sim;

extern "C" {

void sim_listen(void (*on_wait)(const char*), void (*on_fault)(const char*)) {
  world().on_wait = on_wait;
  world().on_fault = on_fault;
}

// All that is queued runs first.
void sim_set_order(int order, int64_t seed) {
  Lock lock;
  drain_all();
  world().order = static_cast<Order>(order);
  world().random.seed(static_cast<uint64_t>(seed));
}

void sim_drain() {
  Lock lock;
  drain_all();
}

// Runs call(number) when the stream gets there.
void sim_enqueue(int device, void* stream, const char* what, void (*call)(int64_t), int64_t number) {
  Lock lock;
  auto run = [=] {
    Unlocked unlocked;
    call(number);
  };
  enqueue(stream ? static_cast<Stream*>(stream) : world().devices[device].default_stream, {what, run});
}

int sim_is_capturing(void* stream) {
  Lock lock;
  return stream && static_cast<Stream*>(stream)->capture != nullptr;
}

int sim_device_count() { return static_cast<int>(world().devices.size()); }
int sim_current_device() { return current_device; }
int64_t sim_device_bytes() { return static_cast<int64_t>(world().device_bytes); }
void* sim_base(int device) { return world().devices[device].base; }
void* sim_alias(int device) { return world().devices[device].alias; }

int sim_is_live(void* address, int64_t bytes) {
  Lock lock;
  return is_live(address, static_cast<size_t>(bytes));
}

// The pieces that cudaMalloc gave out as pairs of first address and bytes; returns how many there are.
int64_t sim_pieces(int device, int64_t* pairs, int64_t room) {
  Lock lock;
  int64_t count = 0;
  for (auto& [first, bytes] : world().devices[device].live) {
    if (count < room) {
      pairs[2 * count] = static_cast<int64_t>(first);
      pairs[2 * count + 1] = static_cast<int64_t>(bytes);
    }
    count++;
  }
  return count;
}

int64_t sim_locked_bytes() { return world().locked_bytes; }
// Bytes that may be page-locked in all; -1 for no limit.
void sim_set_lock_limit(int64_t bytes) { world().lock_limit = bytes; }
// Whether new and freed memory is filled with what no computation survives.
void sim_set_poison(int on) { world().poison = on != 0; }

// Launches so far of kernels and library routines whose name contains `part`.
int64_t sim_launches(const char* part) {
  Lock lock;
  int64_t count = 0;
  for (auto& [name, times] : world().launches)
    if (name.find(part) != std::string::npos) count += times;
  return count;
}

int64_t sim_allocations() { return world().allocations; }

}  // extern "C"
