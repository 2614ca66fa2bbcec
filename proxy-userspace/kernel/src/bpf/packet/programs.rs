//! The programs of the packet splice, and their pins beside the maps.
//!
//! The kernel takes half a second to verify the programs. So they are pinned, as
//! `program-BUILD-ingress` and `program-BUILD-egress`. A process that starts again after a crash
//! finds its programs, and they need no second verification.

use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::Ebpf;
use aya::maps::Map;
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use proxy_common::abi;

use crate::bpf::loader::{self, LoadError};
use crate::bpf::pins;
use crate::failpoint;

/// The names of the programs, with the place where each is attached.
pub(super) const PROGRAMS: [(&str, TcAttachType); 2] =
    [(abi::PROG_PACKET_INGRESS, TcAttachType::Ingress), (abi::PROG_PACKET_EGRESS, TcAttachType::Egress)];

/// The beginning of the names of their pins.
const PROGRAM: &str = "program-";

/// The two programs, verified.
///
/// The programs of this process stay in the object from which they were loaded: opening a program
/// again by its number would need CAP_SYS_ADMIN.
pub(super) struct Programs {
    ebpf: Ebpf,
    earlier: Option<Earlier>,
}

/// The two programs of an earlier process, in the order of [`PROGRAMS`].
pub(super) struct Earlier([SchedClassifier; 2]);

impl Earlier {
    /// The programs that are pinned in `pins`, if they can replace the programs of `ebpf`: if they
    /// are of the same `build` (the same object with the same globals) and use the same maps.
    fn find(ebpf: &Ebpf, build: u64, pins: &Path) -> Option<Self> {
        let Map::Array(records) = ebpf.map(abi::MAP_CONNS)? else { return None };
        let records = records.info().ok()?.id();
        let open = |direction| {
            let program = SchedClassifier::from_pin(program_path(pins, build, direction)).ok()?;
            program.info().ok()?.map_ids().ok()??.contains(&records).then_some(program)
        };
        let [(_, ingress), (_, egress)] = PROGRAMS;
        Some(Self([open(ingress)?, open(egress)?]))
    }
}

impl Programs {
    /// Loads the programs of `ebpf` into the kernel, for which all maps must be open. If the same
    /// programs of an earlier process exist, returns these instead. `pins` is where programs are
    /// pinned.
    pub(super) fn load(
        ebpf: &mut Ebpf,
        build: u64,
        pins: Option<&Path>,
    ) -> Result<Option<Earlier>, LoadError> {
        if let Some(pins) = pins {
            if let Some(earlier) = Earlier::find(ebpf, build, pins) {
                tracing::debug!("the programs of the earlier process are the same");
                return Ok(Some(earlier));
            }
            remove_programs(pins).map_err(|error| LoadError::refused("the earlier programs", error))?;
        }
        PROGRAMS.into_iter().try_for_each(|program| verify(ebpf, program, build, pins))?;
        Ok(None)
    }

    /// The programs of `ebpf`, or `earlier` programs. `earlier` is what [`load`](Self::load) has
    /// returned for this `ebpf`.
    pub(super) fn new(ebpf: Ebpf, earlier: Option<Earlier>) -> Self {
        Self { ebpf, earlier }
    }

    /// One of [`PROGRAMS`].
    ///
    /// # Errors
    /// The object has no such program.
    pub(super) fn get(
        &mut self,
        (name, direction): (&'static str, TcAttachType),
    ) -> Result<&mut SchedClassifier, ProgramError> {
        match &mut self.earlier {
            Some(Earlier([ingress, egress])) => Ok(match direction {
                TcAttachType::Ingress => ingress,
                _ => egress,
            }),
            None => self.ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into(),
        }
    }
}

/// Loads a program into the kernel, and pins the program if there is a place for pins.
fn verify(
    ebpf: &mut Ebpf,
    (name, direction): (&'static str, TcAttachType),
    build: u64,
    pins: Option<&Path>,
) -> Result<(), LoadError> {
    let program: &mut SchedClassifier = loader::program(ebpf, name)?;
    program.load().map_err(|error| loader::not_verified(name, error))?;
    if let Some(pins) = pins {
        // Without its pin, the program is verified again the next time.
        if let Err(error) = program.pin(program_path(pins, build, direction)) {
            tracing::debug!(program = name, error = &error as &dyn std::error::Error, "not pinned");
        }
    }
    if failpoint::is_asked("open a program by its number") {
        let opened = program.info().and_then(|info| info.fd());
        opened.map_err(|error| LoadError::refused(name, error))?;
    }
    Ok(())
}

fn program_path(pins: &Path, build: u64, direction: TcAttachType) -> PathBuf {
    pins.join(format!("{PROGRAM}{build:016x}-{}", name_of(direction)))
}

/// Removes the pins of all programs.
fn remove_programs(pins: &Path) -> io::Result<()> {
    let names = pins::names(pins)?;
    names
        .iter()
        .filter(|name| name.starts_with(PROGRAM))
        .try_for_each(|name| fs::remove_file(pins.join(name)))
}

/// Where a program is attached, as in the names of pins.
pub(super) const fn name_of(direction: TcAttachType) -> &'static str {
    if matches!(direction, TcAttachType::Ingress) { "ingress" } else { "egress" }
}
