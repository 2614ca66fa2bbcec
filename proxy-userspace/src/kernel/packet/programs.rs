//! The programs of the packet splice, and their pins beside the maps.
//!
//! To verify them takes the kernel half a second. So they are pinned, as `program-BUILD-ingress` and `program-BUILD-egress`: a
//! process that is started again after a crash finds its own and is spared that.

use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::Ebpf;
use aya::maps::Map;
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_common::abi;

use crate::kernel::loader::{self, LoadError};
use crate::kernel::pins;

/// By name, and where they are attached.
pub(super) const PROGRAMS: [(&str, TcAttachType); 2] =
    [(abi::PROG_PACKET_INGRESS, TcAttachType::Ingress), (abi::PROG_PACKET_EGRESS, TcAttachType::Egress)];

/// Begins the names of their pins.
const PROGRAM: &str = "program-";

/// The two programs, verified.
pub(super) struct Programs {
    /// In the order of [`PROGRAMS`].
    handles: [SchedClassifier; 2],
}

impl Programs {
    /// Those of `ebpf`, given to the kernel, which needs all maps to be open.
    ///
    /// In `pins`, where they are pinned, there may be those of an earlier process. They are used in their place if they are of
    /// the same `build`: of the same object, with the same globals.
    pub(super) fn load(ebpf: &mut Ebpf, build: u64, pins: Option<&Path>) -> Result<Self, LoadError> {
        if let Some(pins) = pins {
            if let Some(earlier) = Self::earlier(ebpf, build, pins) {
                tracing::debug!("the programs of the earlier process are the same");
                return Ok(earlier);
            }
            remove_programs(pins).map_err(|error| LoadError::refused("the earlier programs", error))?;
        }
        let [ingress, egress] = PROGRAMS;
        Ok(Self { handles: [verify(ebpf, ingress, build, pins)?, verify(ebpf, egress, build, pins)?] })
    }

    /// Those that are pinned, if they are of this build and use the maps of `ebpf`.
    fn earlier(ebpf: &Ebpf, build: u64, pins: &Path) -> Option<Self> {
        let Map::Array(conns) = ebpf.map(abi::MAP_CONNS)? else { return None };
        let conns = conns.info().ok()?.id();
        let open = |direction| {
            let program = SchedClassifier::from_pin(program_path(pins, build, direction)).ok()?;
            program.info().ok()?.map_ids().ok()??.contains(&conns).then_some(program)
        };
        let [(_, ingress), (_, egress)] = PROGRAMS;
        Some(Self { handles: [open(ingress)?, open(egress)?] })
    }

    pub(super) fn get(&mut self, name: &str) -> &mut SchedClassifier {
        let [ingress, egress] = &mut self.handles;
        if name == abi::PROG_PACKET_INGRESS { ingress } else { egress }
    }
}

/// Gives a program to the kernel, and pins it if there is a place for that.
fn verify(
    ebpf: &mut Ebpf,
    (name, direction): (&'static str, TcAttachType),
    build: u64,
    pins: Option<&Path>,
) -> Result<SchedClassifier, LoadError> {
    let program: &mut SchedClassifier = loader::program(ebpf, name)?;
    program.load().map_err(|error| loader::not_verified(name, error))?;
    if let Some(pins) = pins {
        // What cannot be pinned is verified again the next time.
        if let Err(error) = program.pin(program_path(pins, build, direction)) {
            tracing::debug!(program = name, error = &error as &dyn std::error::Error, "not pinned");
        }
    }
    let info = program.info().map_err(|error| LoadError::refused(name, error))?;
    let again = SchedClassifier::from_program_info(info, name.into());
    again.map_err(|error| LoadError::refused(name, error))
}

fn program_path(pins: &Path, build: u64, direction: TcAttachType) -> PathBuf {
    pins.join(format!("{PROGRAM}{build:016x}-{}", name_of(direction)))
}

/// Those of other builds.
fn remove_programs(pins: &Path) -> io::Result<()> {
    let names = pins::names(pins)?;
    names
        .iter()
        .filter(|name| name.starts_with(PROGRAM))
        .try_for_each(|name| fs::remove_file(pins.join(name)))
}

/// Where a program is attached, as pins say it.
pub(super) const fn name_of(direction: TcAttachType) -> &'static str {
    if matches!(direction, TcAttachType::Ingress) { "ingress" } else { "egress" }
}
