//! `steer`: see [`steer::cli`]. This file has only the entry point and the allocator.
#![forbid(unsafe_code)]

#[global_allocator]
static ALLOCATOR: steer_kernel::memory::Allocator = steer_kernel::memory::Allocator;

fn main() -> std::process::ExitCode {
    steer::cli::main()
}
