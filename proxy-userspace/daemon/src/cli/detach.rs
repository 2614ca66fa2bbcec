//! `steer detach`: ends the streams that a stopped Steer has left to the kernel.

use anyhow::Context as _;
use proxy_common::instance::Instance;
use serde_json::json;
use steer_kernel::bpf::packet::pinned::{self, Pinned};
use steer_kernel::bpf::packet::remove_pinned;
use steer_kernel::bpf::pins::{Pins, PinsError};

use super::cleanup::{orphans, others, said_of_orphans};
use crate::splice::packet::{detach, liberal};
use crate::streams::ports;
use crate::takeover;

/// End the streams that a stopped Steer has left to the kernel, and remove its programs (needs
/// root)
///
/// Both peers of each stream get a RST. Without `steer detach`, streams go on until their peers end
/// them, or until `steer run` takes them over.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The instance, as the configuration or `steer run --instance` names it
    #[arg(long, value_name = "NAME", default_value_t)]
    instance: Instance,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let instance = &args.instance;
    let pins = match Pins::take_existing(instance) {
        Err(PinsError::Owned(_)) => anyhow::bail!(
            "{} runs: stop it first (`systemctl stop steer`, or `kill` with its number); then run `steer detach` again",
            pinned::owner(instance)
        ),
        taken => taken?,
    };
    let found = pins.as_ref().map(Pinned::find).transpose().with_context(|| unreadable(instance))?.flatten();
    let (mut streams, mut interfaces) = (0, 0);
    if let (Some(pins), Some(found)) = (&pins, &found) {
        found.ensure_is_here().with_context(|| {
            format!(
                "run `steer detach` in the network namespace of the streams, or see {}",
                cleanup(instance)
            )
        })?;
        interfaces = found.interfaces()?;
        if args.dry_run {
            streams = detach::living(found);
        } else {
            streams = detach::reset_all(found).context("cannot send RSTs; run as root (CAP_NET_RAW)")?;
            liberal::restore(instance).context("cannot turn nf_conntrack_tcp_be_liberal off")?;
            ports::unreserve(&found.reserved()?).context("cannot give the reserved ports back")?;
            takeover::remove_left(instance).context("cannot remove its socket in /run/steer")?;
            remove_pinned(pins)?;
        }
    }
    let orphaned = orphans(args.dry_run)?;
    if args.json {
        let dry_run = args.dry_run;
        let line = json!({
            "instance": instance.as_str(), "streams": streams, "interfaces": interfaces, "dry_run": dry_run,
            "orphaned_interfaces": orphaned,
        });
        println!("{line}");
        return Ok(());
    }
    if orphaned > 0 {
        println!("{}", said_of_orphans(orphaned, args.dry_run));
    }
    if found.is_none() {
        if orphaned == 0 {
            println!("instance {instance}: nothing was left{}", others(instance));
        }
    } else if args.dry_run {
        println!("instance {instance}: would reset {streams} streams and leave {interfaces} interfaces");
        println!("next: the same without --dry-run");
    } else {
        println!("instance {instance}: reset {streams} streams and left {interfaces} interfaces");
    }
    Ok(())
}

fn unreadable(instance: &Instance) -> String {
    format!("cannot read what instance `{instance}` has left; see {}", cleanup(instance))
}

fn cleanup(instance: &Instance) -> String {
    format!("`steer cleanup --instance {instance} --force --dry-run`")
}
