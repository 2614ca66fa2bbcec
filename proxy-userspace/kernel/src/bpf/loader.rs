//! Loads and attaches the BPF programs.

use std::io;
use std::os::fd::AsFd as _;

use aya::maps::sock::SockMapFd;
use aya::maps::{Map, MapData, MapError, RingBuf};
use aya::programs::{Program, ProgramError, ProgramType, SkSkb};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfError, EbpfLoader};
use proxy_common::abi;
use proxy_common::reason::Reason;
use proxy_common::sock::SockEvent;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use xxhash_rust::xxh64::xxh64;

use super::events::Events;
use super::refusal;
use crate::bpf::sock::maps::{Handles, SockMaps, Sockets};
use crate::capability::{self, Capability};

/// Built by `cargo xtask build-ebpf`. Empty if the command was not run before this crate was
/// compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer-ebpf.o"));

/// Why the programs are not in the kernel. Each message ends with what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("built without the BPF object; run cargo xtask build-ebpf and build again")]
    NoObject,
    #[error(
        "{missing} is missing; the process needs {needed} (systemd: in CapabilityBoundingSet=), and to be root for \
         /sys/fs/bpf and /run/steer"
    )]
    NoCapability { missing: &'static str, needed: String },
    #[error("the kernel refused {program} {why} (--log-level debug shows all of the verifier's log)")]
    NotVerified { program: &'static str, why: String },
    #[error("the kernel refused {what}{wanted}")]
    Refused {
        what: &'static str,
        /// What helps, if that is known.
        wanted: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the BPF object has no {name}; run cargo xtask build-ebpf and build again")]
    Incomplete { name: &'static str },
}

impl LoadError {
    /// The reason of the streams that are relayed because of this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoObject | Self::Incomplete { .. } => Reason::NoObject,
            Self::NoCapability { .. } => Reason::NoCapability,
            Self::NotVerified { .. } | Self::Refused { .. } => Reason::KernelRefused,
        }
    }

    pub(crate) fn refused(
        what: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        Self::Refused { what, wanted: refusal::wanted(&*source), source }
    }
}

/// The socket splice's part of the kernel. Dropping both fields removes that part from the kernel.
#[derive(Debug)]
pub struct SockPrograms {
    /// The maps, and the programs, which live as long.
    pub maps: SockMaps,
    /// What the program tells of flows.
    pub events: Events<SockEvent>,
}

/// Loads the socket splice (needs CAP_BPF and CAP_NET_ADMIN). Call this inside a tokio runtime: the
/// event ring registers with the runtime.
pub fn load_sock_splice() -> Result<SockPrograms, LoadError> {
    let mut loader = EbpfLoader::new();
    shrink(&mut loader, &super::packet::MAPS);
    let mut ebpf = load_object(&mut loader, &[Capability::BPF, Capability::NET_ADMIN])?;

    let ring = typed::<RingBuf<MapData>>(take(&mut ebpf, abi::MAP_SOCK_EVENTS)?, abi::MAP_SOCK_EVENTS)?;
    let source: Sockets = handles(&mut ebpf, abi::MAP_SOCK_SOURCE)?;
    attach(&mut ebpf, source.reader.fd())?;
    let maps = SockMaps {
        target: handles(&mut ebpf, abi::MAP_SOCK_TARGET)?,
        source,
        flow: handles(&mut ebpf, abi::MAP_SOCK_FLOW)?,
        credit: handles(&mut ebpf, abi::MAP_SOCK_CREDIT)?,
        _programs: ebpf,
    };
    let events = Events::new(ring).map_err(|error| LoadError::refused("the event ring", error))?;
    Ok(SockPrograms { maps, events })
}

/// Both splices are in one object, and loading the object makes the maps of both. The maps of the
/// splice that is not wanted get a single entry (a ring: one page).
pub(crate) fn shrink(loader: &mut EbpfLoader<'_>, maps: &[&'static str]) {
    for map in maps {
        loader.map_max_entries(map, 1);
    }
}

/// Makes the maps and prepares the programs. No program is in the kernel yet.
pub(crate) fn load_object(loader: &mut EbpfLoader<'_>, needed: &[Capability]) -> Result<Ebpf, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoObject);
    }
    // Asked first, since EPERM does not tell which capability is missing.
    if let Some(missing) = capability::missing(needed) {
        let needed: Vec<_> = needed.iter().map(|needed| needed.0).collect();
        return Err(LoadError::NoCapability { missing: missing.0, needed: needed.join(", ") });
    }
    // aya raises RLIMIT_MEMLOCK itself where the kernel (before 5.11) counts maps against it.
    let mut ebpf = loader.load(OBJECT).map_err(not_loaded)?;
    start_program_log(&mut ebpf);
    Ok(ebpf)
}

/// A number for this object with this mark. The programs of another build, or with another mark,
/// have another number.
pub(crate) fn build(mark: u32) -> u64 {
    xxh64(OBJECT, mark.into())
}

/// Whether TC programs may call bpf_loop (Linux 5.17, and some older kernels of distributions). If
/// the kernel does not tell, the answer is yes: if that is wrong, loading the programs fails and
/// says so.
pub(crate) fn has_loop() -> bool {
    let found = is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_loop);
    found.unwrap_or(true)
}

fn attach(ebpf: &mut Ebpf, source: &SockMapFd) -> Result<(), LoadError> {
    let name = abi::PROG_SOCK_SPLICE;
    let program: &mut SkSkb = program(ebpf, name)?;
    program.load().map_err(|error| not_verified(name, error))?;
    program.attach(source).map_err(|error| LoadError::refused("attaching sock_splice", error))?;
    Ok(())
}

pub(crate) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or(LoadError::Incomplete { name })?;
    program.try_into().map_err(|error| LoadError::refused(name, error))
}

/// The verifier's log can have thousands of lines, so it goes to the debug log only.
pub(crate) fn not_verified(program: &'static str, error: ProgramError) -> LoadError {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        tracing::debug!(program, %verifier_log, "the verifier refused a program");
        LoadError::NotVerified { program, why: refusal::of_verifier(&io_error, &verifier_log.to_string()) }
    } else {
        LoadError::refused(program, error)
    }
}

fn not_loaded(error: EbpfError) -> LoadError {
    let what = if matches!(error, EbpfError::MapError(_)) { "the maps" } else { "the BPF object" };
    LoadError::refused(what, error)
}

fn handles<M: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<Handles<M>, LoadError> {
    let map = take(ebpf, name)?;
    let (Map::SockHash(data) | Map::HashMap(data)) = &map else {
        return Err(LoadError::Incomplete { name });
    };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(|error| LoadError::refused(name, error))?;
    let again = MapData::from_fd(fd).and_then(Map::from_map_data);
    let again = again.map_err(|error| LoadError::refused(name, error))?;
    Ok(Handles::new(typed(map, name)?, typed(again, name)?))
}

pub(crate) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, LoadError> {
    ebpf.take_map(name).ok_or(LoadError::Incomplete { name })
}

pub(crate) fn typed<M: TryFrom<Map, Error = MapError>>(map: Map, name: &'static str) -> Result<M, LoadError> {
    M::try_from(map).map_err(|error| LoadError::refused(name, error))
}

/// Forwards the programs' trace lines, if they were built with any (`build-ebpf --log`).
fn start_program_log(ebpf: &mut Ebpf) {
    if ebpf.map("AYA_LOGS").is_none() {
        return;
    }
    let logger = aya_log::EbpfLogger::init(ebpf).map_err(io::Error::other).and_then(|logger| {
        // SAFETY: the logger owns its descriptor, always gives the same one, and closes it when
        // dropped.
        let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        Ok(logger?)
    });
    match logger {
        Ok(mut logger) => {
            tokio::spawn(async move {
                while let Ok(mut ready) = logger.readable_mut().await {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
            });
        }
        Err(error) => tracing::warn!(%error, "cannot read the BPF programs' log"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_next_step() {
        let missing =
            LoadError::NoCapability { missing: "CAP_BPF", needed: "CAP_BPF, CAP_NET_ADMIN".to_owned() };
        assert!(
            missing.to_string().starts_with("CAP_BPF is missing; the process needs CAP_BPF, CAP_NET_ADMIN")
        );
        assert_eq!(missing.reason(), Reason::NoCapability);
        assert!(LoadError::NoObject.to_string().contains("cargo xtask build-ebpf"));
    }
}
