//! `steer cleanup`: removes what stopped Steers have left and nobody needs.

use serde_json::{Value, json};

use crate::config::Instance;
use crate::kernel::packet::pinned::{self, Pinned};
use crate::kernel::pins::{self, Pins, PinsError};
use crate::splice::packet::detach;
use crate::upstream::ports;

/// Remove what stopped Steers have left in the kernel and no stream needs (needs root)
///
/// What streams still need is kept, and so is what this version cannot read, unless --force says otherwise.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this instance
    #[arg(long, value_name = "NAME")]
    instance: Option<Instance>,
    /// Remove what cannot be read, or is of another network namespace, too: its streams hang until their peers notice
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON array with one object for each instance
    #[arg(long)]
    json: bool,
}

/// What becomes of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Removed,
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
    if args.json {
        let objects: Vec<_> =
            verdicts.iter().map(|(instance, verdict)| object(instance, verdict, args)).collect();
        println!("{}", Value::from(objects));
    } else if verdicts.is_empty() {
        println!("nothing was left");
    } else {
        let removed = if args.dry_run { "would be removed" } else { "removed" };
        for (instance, verdict) in verdicts {
            match verdict {
                Verdict::Removed => println!("instance {instance}: {removed}"),
                Verdict::Kept { why, next } => println!("instance {instance}: kept: {why}\nnext: {next}"),
            }
        }
    }
    Ok(())
}

/// `None`: there is no such instance.
fn clean(instance: &Instance, args: &Args) -> anyhow::Result<Option<Verdict>> {
    let pins = match Pins::take_existing(instance) {
        Err(PinsError::Owned(_)) => {
            let why = format!("{} runs", pinned::owner(instance));
            let next = "stop it first, if it is to go".to_owned();
            return Ok(Some(Verdict::Kept { why, next }));
        }
        taken => taken?,
    };
    let Some(pins) = pins else { return Ok(None) };
    let found = Pinned::find(&pins).and_then(|found| {
        found.as_ref().map_or(Ok(()), Pinned::ensure_is_here)?;
        Ok(found)
    });
    let verdict = match &found {
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
        _ => Verdict::Removed,
    };
    if verdict == Verdict::Removed && !args.dry_run {
        if let Ok(Some(found)) = &found {
            ports::unreserve(&found.reserved()?)?;
        }
        pins.remove()?;
    }
    Ok(Some(verdict))
}

fn object(instance: &Instance, verdict: &Verdict, args: &Args) -> Value {
    let (instance, dry_run) = (instance.as_str(), args.dry_run);
    match verdict {
        Verdict::Removed => json!({ "instance": instance, "removed": true, "dry_run": dry_run }),
        Verdict::Kept { why, next } => {
            json!({ "instance": instance, "removed": false, "why": why, "next": next, "dry_run": dry_run })
        }
    }
}
