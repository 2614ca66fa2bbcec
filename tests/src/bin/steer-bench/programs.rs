//! What a packet costs in each BPF program of the packet splice, under load.

use anyhow::Result;

use crate::lanes::Lanes;
use crate::plan::Profile;
use crate::results::Series;
use crate::subjects::Subject;

/// Loads `subject`, which is [`Kind::SteerPacket`](crate::subjects::Kind), with the endpoint running.
pub(crate) fn run(_lanes: &Lanes, _subject: &Subject<'_>, _profile: Profile) -> Result<Vec<Series>> {
    Ok(Vec::new())
}
