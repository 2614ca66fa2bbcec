//! Whether a peer ever refuses, because of the splice, a segment as too old (PAWS): a model in
//! which a scheduler without mercy decides what happens next.
//!
//! *A* is a receiver with the rule of Linux; the endpoint *B* sends to it by its own clock. B's
//! packets wait on two CPUs of the proxy, which take them through the real code step by step; the
//! proxy's own socket towards A still sends, and repeats, what it was given before the hand-over;
//! userspace sets the floor, switches twice, and makes up acknowledgements. Between any two steps
//! anything else may happen, and any time may pass. The network after the proxy keeps the order,
//! and so does the way from the egress program to the network: a change of order there does not
//! come from the splice. A step of one function is one step of the model: what several CPUs write
//! at once is written by compare-exchange. (`seq_end` is not; that two CPUs lose an advance of it,
//! the own socket acknowledges something at that moment and a third packet is overtaken is left
//! out.)
//!
//! What must hold:
//! 1. A segment of B that A refuses would have been refused without a proxy, too, had B sent the
//!    made-up ones with its latest timestamp (and, if it has no bytes, the own socket's
//!    acknowledgements).
//! 2. No segment of the own socket with bytes that A lacks is refused. Nor is one that A has
//!    already, if it is sent in the hand-over and no packet overtakes it inside the proxy.
//! 3. Nor is an acknowledgement of the own socket, unless a packet overtakes it inside the proxy,
//!    or A has taken one that the proxy does not believe.

mod old;
mod world;

use world::{Refused, Rule, Scheduler, World};

/// What may happen in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cast {
    cpus: usize,
    /// The own socket sends.
    own: bool,
    /// Userspace makes up acknowledgements.
    made_up: bool,
    /// Some packets of B are not believed.
    unbelieved: bool,
}

const NOBODY: Cast = Cast { cpus: 1, own: false, made_up: false, unbelieved: false };
const EVERYBODY: Cast = Cast { cpus: 2, own: true, made_up: true, unbelieved: true };

/// Each by itself, so that it can be seen which one the old rule did not stand.
const CASTS: [(&str, Cast); 6] = [
    ("nobody else", NOBODY),
    ("another CPU", Cast { cpus: 2, ..NOBODY }),
    ("the own socket", Cast { own: true, ..NOBODY }),
    ("made-up segments", Cast { made_up: true, ..NOBODY }),
    ("packets that are not believed", Cast { unbelieved: true, ..NOBODY }),
    ("everybody", EVERYBODY),
];

const RUNS: u64 = 20_000;

fn first_refusal(rule: Rule, cast: Cast) -> Option<(u64, Refused)> {
    (1..=RUNS)
        .find_map(|seed| World::new(rule, cast, Scheduler::new(seed)).run().map(|refused| (seed, refused)))
}

#[test]
fn nothing_is_refused_because_of_the_splice() {
    for (name, cast) in CASTS {
        let refused = first_refusal(Rule::New, cast);
        assert!(refused.is_none(), "with {name}, by seed: {refused:?}");
    }
}

/// That the model finds what there is to be found: in packets that were stamped with the clock,
/// with a difference that was fixed when the sockets were done.
#[test]
fn the_old_rule_had_faults_that_the_model_finds() {
    let found = CASTS.map(|(name, cast)| (name, first_refusal(Rule::Old, cast)));
    for (name, refused) in found {
        println!("with {name}, by seed: {refused:?}");
        let is_harmless = matches!(name, "nobody else" | "packets that are not believed");
        assert_eq!(refused.is_none(), is_harmless, "with {name}: {refused:?}");
    }
}

/// Each guard of the new rule is needed: without it the model finds a refusal.
#[test]
fn no_part_of_the_rule_can_be_left_out() {
    for rule in [
        Rule::WithoutFloor,
        Rule::OwnByTheClock,
        Rule::EachCpuByItself,
        Rule::ShiftEarly,
        Rule::NotNoted,
        Rule::FloorLate,
    ] {
        assert!(first_refusal(rule, EVERYBODY).is_some(), "{rule:?}");
    }
}
