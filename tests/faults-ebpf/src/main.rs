//! Loss, duplication and reordering of TCP packets at a device, for tests. Not a part of Steer.
//!
//! A packet that has to come late takes a detour. It leaves by a device with a slow queue. The
//! program `fault_return` at that device's peer brings it back. The packet's mark says that it
//! already had a fault, and at which hook.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC};
    use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_redirect};
    use aya_ebpf::macros::{classifier, map};
    use aya_ebpf::maps::{Array, PerCpuArray};
    use aya_ebpf::programs::TcContext;
    use faults_ebpf::{count, setting};

    /// Writer: userspace. Reader: the programs.
    #[map]
    static FAULT_SETTINGS: Array<u32> = Array::with_max_entries(setting::LEN, 0);

    /// Writer: the programs. Reader: userspace.
    #[map]
    static FAULT_COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::LEN, 0);

    /// The mark of packets that already had a fault. One more at the ingress hook.
    const MARK: u32 = 0xfa17_0000;

    #[classifier]
    fn fault_ingress(ctx: TcContext) -> i32 {
        fault(&ctx, MARK + 1)
    }

    #[classifier]
    fn fault_egress(ctx: TcContext) -> i32 {
        fault(&ctx, MARK)
    }

    /// At the end of the detour: sends a packet on to its original destination.
    #[classifier]
    fn fault_return(ctx: TcContext) -> i32 {
        let mark = mark(&ctx);
        if mark & !1 != MARK {
            return TC_ACT_SHOT;
        }
        add(count::RETURNED);
        redirect(setting(setting::HOME), flags(mark))
    }

    #[inline(always)]
    fn fault(ctx: &TcContext, own_mark: u32) -> i32 {
        if mark(ctx) & !1 == MARK {
            ctx.set_mark(0);
            return TC_ACT_UNSPEC;
        }
        if !is_established_tcp(ctx) {
            return TC_ACT_UNSPEC;
        }
        add(count::SEEN);
        // SAFETY: the helper has no arguments and cannot fail.
        let dice = unsafe { bpf_get_prandom_u32() } % 1000;
        let lost = setting(setting::LOSS);
        let twice = lost + setting(setting::DUPLICATION);
        let late = twice + setting(setting::REORDERING);
        if dice < lost {
            add(count::LOST);
            TC_ACT_SHOT
        } else if dice < twice {
            ctx.set_mark(own_mark);
            if ctx.clone_redirect(setting(setting::HOME), flags(own_mark)).is_ok() {
                add(count::DUPLICATED);
            }
            ctx.set_mark(0);
            TC_ACT_UNSPEC
        } else if dice < late {
            add(count::LEFT);
            ctx.set_mark(own_mark);
            redirect(setting(setting::DETOUR), 0)
        } else {
            TC_ACT_UNSPEC
        }
    }

    /// Whether the packet is TCP without SYN, over Ethernet and IP without options. The loss of a
    /// SYN would cost a second and test nothing.
    #[inline(always)]
    fn is_established_tcp(ctx: &TcContext) -> bool {
        const TCP: u8 = 6;
        const SYN: u8 = 2;
        let (protocol, tcp) = match ctx.load::<u16>(12).map(u16::from_be) {
            Ok(0x0800) => (23, 34),
            Ok(0x86dd) => (20, 54),
            _ => return false,
        };
        ctx.load::<u8>(protocol) == Ok(TCP) && ctx.load::<u8>(tcp + 13).is_ok_and(|flags| flags & SYN == 0)
    }

    #[inline(always)]
    fn mark(ctx: &TcContext) -> u32 {
        // SAFETY: the context of a running program points to the program's packet.
        unsafe { (*ctx.skb.skb).mark }
    }

    /// The flags of a redirect to the hook that `mark` names.
    #[inline(always)]
    fn flags(mark: u32) -> u64 {
        if mark & 1 == 1 { u64::from(BPF_F_INGRESS) } else { 0 }
    }

    #[inline(always)]
    fn redirect(device: u32, flags: u64) -> i32 {
        // SAFETY: the helper only stores two integers, which the kernel reads after the program.
        (unsafe { bpf_redirect(device, flags) }) as i32
    }

    #[inline(always)]
    fn setting(index: u32) -> u32 {
        FAULT_SETTINGS.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn add(index: u32) {
        if let Some(count) = FAULT_COUNTS.get_ptr_mut(index) {
            // SAFETY: the pointer is to an entry of a per-CPU map. Nobody else writes the entry
            // while this program runs.
            unsafe { *count += 1 };
        }
    }

    /// Most helpers are only for programs under a GPL-compatible licence.
    #[unsafe(no_mangle)]
    #[unsafe(link_section = "license")]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        // The verifier refuses a program that can reach this.
        loop {}
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() -> std::process::ExitCode {
    eprintln!("faults-ebpf holds BPF programs and does nothing on the host; run: cargo xtask build-ebpf");
    std::process::ExitCode::FAILURE
}
