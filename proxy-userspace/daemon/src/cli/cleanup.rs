//! `steer cleanup`: removes what stopped Steers have left in the kernel and no stream needs.

use anyhow::Context as _;
use proxy_common::instance::Instance;
use serde_json::{Value, json};
use steer_kernel::bpf::packet::pinned::{self, Pinned};
use steer_kernel::bpf::packet::{Orphans, remove_pinned};
use steer_kernel::bpf::pins::{self, Pins, PinsError};

use crate::splice::packet::{detach, liberal};
use crate::streams::ports;
use crate::takeover;

/// Remove what stopped Steers have left in the kernel and no stream needs (needs root)
///
/// An instance with living streams is kept. Without --force, an instance is also kept if this
/// version cannot read its maps, or if another network namespace uses it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this instance
    #[arg(long, value_name = "NAME")]
    instance: Option<Instance>,
    /// Also remove an instance that cannot be read, or that another network namespace uses: its
    /// streams hang until their peers notice
    #[arg(long)]
    force: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON array with one object for each instance
    #[arg(long)]
    json: bool,
}

/// What happens to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Removed { why: &'static str },
    Kept { why: String, next: String },
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let instances = match &args.instance {
        Some(instance) => vec![instance.clone()],
        None => pins::instances()?,
    };
    let mut verdicts = Vec::new();
    for instance in instances {
        if let Some(verdict) = clean(&instance, args)? {
            verdicts.push((instance, verdict));
        }
    }
    let orphaned = orphans(args.dry_run)?;
    if args.json {
        let mut objects: Vec<_> =
            verdicts.iter().map(|(instance, verdict)| object(instance, verdict, args)).collect();
        if orphaned > 0 {
            let why = said_of_orphans(orphaned, args.dry_run);
            objects.push(json!({ "instance": null, "removed": true, "why": why, "dry_run": args.dry_run }));
        }
        println!("{}", Value::from(objects));
        return Ok(());
    }
    if orphaned > 0 {
        println!("{}", said_of_orphans(orphaned, args.dry_run));
    }
    if verdicts.is_empty() {
        if orphaned > 0 {
            return Ok(());
        }
        println!("nothing was left{}", args.instance.as_ref().map_or(String::new(), others));
    } else {
        let removed = if args.dry_run { "would be removed" } else { "removed" };
        for (instance, verdict) in verdicts {
            match verdict {
                Verdict::Removed { why } => println!("instance {instance}: {removed}: {why}"),
                Verdict::Kept { why, next } => println!("instance {instance}: kept: {why}\nnext: {next}"),
            }
        }
    }
    Ok(())
}

/// Removes what an instance has left, or says why it is kept. `None`: there is no instance with
/// this name.
fn clean(instance: &Instance, args: &Args) -> anyhow::Result<Option<Verdict>> {
    let pins = match Pins::take_existing(instance) {
        Err(PinsError::Owned(_)) => {
            let why = format!("{} runs", pinned::owner(instance));
            let next = "to remove the instance, stop this process first".to_owned();
            return Ok(Some(Verdict::Kept { why, next }));
        }
        taken => taken?,
    };
    let Some(pins) = pins else { return Ok(None) };
    let found = Pinned::find(&pins).and_then(|found| {
        if let Some(found) = &found
            && !found.is_abandoned()?
        {
            found.ensure_is_here()?;
        }
        Ok(found)
    });
    let verdict = match &found {
        Ok(Some(found)) if found.is_abandoned()? => {
            Verdict::Removed { why: "its network namespace is gone, and its streams with it" }
        }
        Ok(Some(found)) if detach::living(found) > 0 => Verdict::Kept {
            why: format!("{} streams live", detach::living(found)),
            next: format!(
                "`steer run --instance {instance}` takes them over, `steer detach --instance {instance}` ends them"
            ),
        },
        Err(error) if !args.force => Verdict::Kept {
            why: error.to_string(),
            next: format!("`steer cleanup --instance {instance} --force` removes it with its streams"),
        },
        Err(_) => Verdict::Removed { why: "by force" },
        Ok(_) => Verdict::Removed { why: "no stream lives" },
    };
    if matches!(verdict, Verdict::Removed { .. }) && !args.dry_run {
        // Ports are reserved for each network namespace: those of another one are not given back
        // here.
        if let Ok(Some(found)) = &found
            && found.ensure_is_here().is_ok()
        {
            liberal::restore(instance).context("cannot turn nf_conntrack_tcp_be_liberal off")?;
            ports::unreserve(&found.reserved()?)?;
        }
        takeover::remove_left(instance).context("cannot remove its socket in /run/steer")?;
        remove_pinned(&pins)?;
    }
    Ok(Some(verdict))
}

/// Removes the filters that dead processes have left in this network namespace, unless this is a
/// `dry_run`. Returns the number of interfaces with such filters.
pub(super) fn orphans(dry_run: bool) -> anyhow::Result<usize> {
    let orphans = Orphans::find().context("cannot list the filters of interfaces; run as root")?;
    let interfaces = orphans.interfaces();
    if !dry_run {
        orphans
            .remove()
            .context("cannot remove the filters of a process that has died; run as root (CAP_NET_ADMIN)")?;
    }
    Ok(interfaces)
}

pub(super) fn said_of_orphans(interfaces: usize, dry_run: bool) -> String {
    let removed = if dry_run { "would be removed" } else { "removed" };
    format!("filters of a process that has died, on {interfaces} interfaces: {removed}")
}

/// The names of all other instances that have left something, in case `instance` is misspelt.
pub(super) fn others(instance: &Instance) -> String {
    let all = pins::instances().unwrap_or_default();
    let names: Vec<_> = all.iter().filter(|other| *other != instance).map(Instance::as_str).collect();
    if names.is_empty() { String::new() } else { format!(" (there are others: {})", names.join(", ")) }
}

fn object(instance: &Instance, verdict: &Verdict, args: &Args) -> Value {
    let (instance, dry_run) = (instance.as_str(), args.dry_run);
    match verdict {
        Verdict::Removed { why } => {
            json!({ "instance": instance, "removed": true, "why": why, "dry_run": dry_run })
        }
        Verdict::Kept { why, next } => {
            json!({ "instance": instance, "removed": false, "why": why, "next": next, "dry_run": dry_run })
        }
    }
}
