// For torch's CPU build: CUDA devices that are there and do nothing, so that fake tensors can be on one, and autograd
// has a thread for each. Values, streams and torch.cuda itself stay away.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::EventFlag, c10::Stream;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

Device on(DeviceIndex index) { return Device(DeviceType::CUDA, index < 0 ? current : index); }

struct IdleGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return on(current); }
  void setDevice(Device device) const override { current = on(device.index()).index(); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, on(device.index())); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  // Any address but null stands for an event; it is never looked at.
  void record(void** event, const Stream&, DeviceIndex, EventFlag) const override { *event = &current; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};

c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new IdleGuard());

// torch looks for hooks of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

using at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace
