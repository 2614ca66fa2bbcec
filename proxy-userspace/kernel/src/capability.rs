//! What this process may ask of the kernel.

/// A capability by its name and number (include/uapi/linux/capability.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capability(pub(crate) &'static str, u32);

impl Capability {
    pub(crate) const NET_ADMIN: Self = Self("CAP_NET_ADMIN", 12);
    pub(crate) const NET_RAW: Self = Self("CAP_NET_RAW", 13);
    /// Stands in for the next two, which came with Linux 5.8.
    const SYS_ADMIN: Self = Self("CAP_SYS_ADMIN", 21);
    pub(crate) const PERFMON: Self = Self("CAP_PERFMON", 38);
    pub(crate) const BPF: Self = Self("CAP_BPF", 39);

    /// The capabilities that the packet splice needs. The verifier demands PERFMON for the
    /// programs' arithmetic with packet pointers; `tcp::raw` needs NET_RAW.
    pub(crate) const OF_THE_SPLICE: [Self; 4] = [Self::BPF, Self::PERFMON, Self::NET_ADMIN, Self::NET_RAW];

    fn is_in(self, effective: u64) -> bool {
        let has = |Self(_, number): Self| effective & (1 << number) != 0;
        has(self) || (matches!(self, Self::BPF | Self::PERFMON) && has(Self::SYS_ADMIN))
    }
}

/// The capabilities that splicing needs and this process has, as a list for the log; "unknown" if
/// /proc does not tell.
pub fn held() -> String {
    let Some(effective) = effective() else { return "unknown".to_owned() };
    let held: Vec<_> = Capability::OF_THE_SPLICE
        .iter()
        .filter(|capability| capability.is_in(effective))
        .map(|held| held.0)
        .collect();
    if held.is_empty() { "none".to_owned() } else { held.join(",") }
}

/// The first of `needed` that this process does not have; `None` also if /proc does not tell.
pub(crate) fn missing(needed: &[Capability]) -> Option<Capability> {
    let effective = effective()?;
    needed.iter().copied().find(|capability| !capability.is_in(effective))
}

fn effective() -> Option<u64> {
    effective_capabilities(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// `CapEff` of `/proc/PID/status`.
fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_proc() {
        assert_eq!(
            effective_capabilities("Name:\tsteer\nCapEff:\t000001ffffffffff\n"),
            Some(0x1ff_ffff_ffff)
        );
        assert_eq!(effective_capabilities("Name:\tsteer\n"), None);
    }

    #[test]
    fn the_old_capability_stands_in_for_the_new_ones() {
        let sys_admin = 1 << 21;
        assert!(Capability::BPF.is_in(sys_admin) && Capability::PERFMON.is_in(sys_admin));
        assert!(!Capability::NET_ADMIN.is_in(sys_admin));
        assert!(Capability::NET_ADMIN.is_in(1 << 12) && Capability::BPF.is_in(1 << 39));
        assert!(!Capability::BPF.is_in(1 << 38));
    }
}
