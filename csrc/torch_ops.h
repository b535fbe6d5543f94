// Ops that torch's dispatcher calls without going through Python, which would take longer than all the rest of a call.
#pragma once

namespace dsv3::torch_ops {

// Registers the kernel of dsv3::<name> under a dispatch key. False where there is none, or the loaded torch lacks a
// function of torch_abi.h. The kernel launches on devices given to `use_device`, unless references are forced; every other
// call, and one that the native op refuses, it hands on as it is to dsv3_python::<name>, of the same schema.
bool register_op(const char* name, const char* dispatch_key);
void use_device(int index);
void force_references(bool forced);

// Throws what an op of dsv3_python raised; set once, by the bindings.
extern void (*throw_python_error)();

}  // namespace dsv3::torch_ops
