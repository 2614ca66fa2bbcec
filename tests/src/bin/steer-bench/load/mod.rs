//! The load generator.

use anyhow::Result;

use crate::spec::{Load, Measured};

/// # Errors
/// When the run could not be made.
pub(crate) fn run(load: &Load) -> Result<Measured> {
    anyhow::bail!("not there yet: {load:?}")
}
