//! The BPF programs: thin shells over `proxy-common`, without policy. Built for BPF by `cargo xtask
//! build-ebpf`. The same code also compiles for the host, so that `cargo clippy` and rust-analyzer
//! see it. The result is a program that only says what it is.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod maps;
mod packet;
mod sock_splice;

/// `SO_MARK` of the proxy's own sockets during a hand-over, set by userspace when it loads the
/// programs ([`proxy_common::abi::GLOBAL_MARK`]).
#[unsafe(no_mangle)]
static MARK: u32 = proxy_common::abi::DEFAULT_MARK;

/// 1 if the kernel has the helper bpf_loop (Linux 5.17), else 0; set by userspace when it loads the
/// programs ([`proxy_common::abi::GLOBAL_HAS_LOOP`]). The verifier skips code that cannot be
/// reached with this value.
#[unsafe(no_mangle)]
static HAS_LOOP: u32 = 1;

/// Whether bpf_loop may be called.
#[inline(always)]
fn has_loop() -> bool {
    // SAFETY: nothing writes this global while the program runs. Userspace sets the value after
    // compilation, so the read is volatile.
    unsafe { (&raw const HAS_LOOP).read_volatile() == 1 }
}

/// Helpers such as `bpf_sk_redirect_hash` are for programs under a GPL-compatible licence.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can come here.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() -> std::process::ExitCode {
    eprintln!("steer-ebpf holds BPF programs and does nothing on the host; run: cargo xtask build-ebpf");
    std::process::ExitCode::FAILURE
}
