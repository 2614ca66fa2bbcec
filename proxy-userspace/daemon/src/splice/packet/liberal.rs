//! `packet_splice.conntrack: liberal`: turns `nf_conntrack_tcp_be_liberal` on while an instance needs
//! it, and off again.
//!
//! The setting belongs to a network namespace. Each instance that needs it there has a note with the
//! namespace, in its directory below /run/steer. The first instance turns the setting on, and the
//! instance that removes the last note turns it off. If the setting was on before the first instance
//! came, an operator has turned it on: then there is no note, and the setting stays.
//!
//! A note outlives its process. So the next process of the instance, `steer detach` or `steer
//! cleanup` turns the setting off after a crash.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use proxy_common::instance::Instance;
use rustix::fs::{FlockOperation, flock};
use steer_kernel::net::conntrack;
use steer_kernel::net::host;

const DIRECTORY: &str = "/run/steer";
const NOTE: &str = "conntrack-liberal";

/// Turns the setting on, if the kernel has it. Nothing happens if it is on.
///
/// # Errors
/// The setting or the note cannot be written.
pub(super) fn turn_on(instance: &Instance) -> io::Result<()> {
    let namespace = host::netns_cookie()?;
    let Some(is_on) = conntrack::is_liberal()? else { return Ok(()) };
    let _locked = lock()?;
    let mine = read(&note_of(instance)) == Some(namespace);
    if is_on && !mine && !others_need_it(namespace, instance)? {
        return Ok(());
    }
    if !mine {
        // Before the setting: a process that dies in between leaves a note that does no harm.
        let note = note_of(instance);
        fs::create_dir_all(note.parent().unwrap_or(Path::new(DIRECTORY)))?;
        fs::write(note, namespace.to_string())?;
    }
    if !is_on {
        conntrack::set_liberal(true)?;
        tracing::info!(
            "turned net.netfilter.nf_conntrack_tcp_be_liberal on (packet_splice.conntrack: liberal)"
        );
    }
    Ok(())
}

/// Turns the setting off, if the instance has a note for this network namespace and no other
/// instance has one.
///
/// # Errors
/// The setting cannot be written, or the note cannot be removed.
pub fn restore(instance: &Instance) -> io::Result<()> {
    let note = note_of(instance);
    if read(&note).is_none() {
        return Ok(());
    }
    let namespace = host::netns_cookie()?;
    let _locked = lock()?;
    if read(&note) != Some(namespace) {
        return Ok(());
    }
    if !others_need_it(namespace, instance)? && conntrack::is_liberal()? == Some(true) {
        conntrack::set_liberal(false)?;
        tracing::info!("turned net.netfilter.nf_conntrack_tcp_be_liberal off again");
    }
    // After the setting: a process that dies in between leaves a note that does no harm. Without
    // the note, the setting would look like an operator's, and stay on.
    fs::remove_file(&note)?;
    // The directory may have a control socket.
    note.parent().map(fs::remove_dir);
    Ok(())
}

fn note_of(instance: &Instance) -> PathBuf {
    Path::new(DIRECTORY).join(instance.as_str()).join(NOTE)
}

/// The network namespace in a note.
fn read(note: &Path) -> Option<u64> {
    fs::read_to_string(note).ok()?.trim().parse().ok()
}

/// Whether another instance has a note for the network namespace.
fn others_need_it(namespace: u64, instance: &Instance) -> io::Result<bool> {
    for entry in fs::read_dir(DIRECTORY)? {
        let note = entry?.path().join(NOTE);
        if note != note_of(instance) && read(&note) == Some(namespace) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Two instances may start or stop at the same time. Closing the file unlocks it.
fn lock() -> io::Result<File> {
    fs::create_dir_all(DIRECTORY)?;
    let directory = File::open(DIRECTORY)?;
    flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}
