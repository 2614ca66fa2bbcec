//! What is measured, how often and for how long.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::outlive::Event;
use crate::results::Params;
use crate::spec::{Method, Way, Work};
use crate::subjects::Kind;

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// At most four minutes: the most important cases, without Steer's two other paths.
    Quick,
    Standard,
    Full,
}

impl Profile {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Standard => "standard",
            Self::Full => "full",
        }
    }
}

/// The size of each measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) rounds: usize,
    pub(crate) warm_up: Duration,
    pub(crate) span: Duration,
}

impl Size {
    pub(crate) const fn of(profile: Profile) -> Self {
        let (rounds, warm_up, span) = match profile {
            Profile::Quick => (5, 250, 600),
            Profile::Standard => (5, 500, 1500),
            Profile::Full => (9, 1000, 3000),
        };
        Self { rounds, warm_up: Duration::from_millis(warm_up), span: Duration::from_millis(span) }
    }
}

/// One load, under which all subjects are compared.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Case {
    pub(crate) work: Work,
    pub(crate) workload: &'static str,
    pub(crate) params: Params,
    /// Short and unique. It begins with the name of the workload.
    pub(crate) name: String,
}

/// Everything that one run of the benchmark measures.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) profile: Profile,
    pub(crate) size: Size,
    pub(crate) cases: Vec<Case>,
    pub(crate) subjects: Vec<Kind>,
    pub(crate) memory: bool,
    pub(crate) programs: bool,
    pub(crate) outlive: Vec<Event>,
    /// Names and values.
    pub(crate) client_settings: Vec<(String, String)>,
}

impl Plan {
    /// Chooses cases whose names begin with an element of `only` (all cases if it is empty), and
    /// the subjects `peers`. The direct connection is always added.
    ///
    /// # Errors
    /// When an element of `only` matches no case.
    pub(crate) fn new(profile: Profile, size: Size, only: &[String], peers: &[Kind]) -> Result<Self> {
        // A case that is asked for by name is found in every profile, even if only the long profile
        // has it by default.
        let all = cases(Profile::Standard);
        let extra: Vec<_> = ["memory", "programs"].into_iter().chain(Event::ALL.map(Event::name)).collect();
        for name in only {
            let known = all.iter().any(|case| case.name.starts_with(name.as_str()));
            anyhow::ensure!(
                known || extra.iter().any(|extra| extra.starts_with(name.as_str())),
                "there is no {name}; there are: {}, {}",
                all.iter().map(|case| case.name.as_str()).collect::<Vec<_>>().join(", "),
                extra.join(", ")
            );
        }
        let wanted = |name: &str| only.is_empty() || only.iter().any(|only| name.starts_with(only.as_str()));
        let mut chosen: Vec<_> = cases(profile).into_iter().filter(|case| wanted(&case.name)).collect();
        if chosen.is_empty() {
            chosen = all.into_iter().filter(|case| wanted(&case.name)).collect();
        }
        let compared = |kind: &Kind| match kind {
            Kind::Direct => true,
            Kind::SteerSockmap | Kind::SteerRelay if peers.is_empty() => profile != Profile::Quick,
            kind => peers.is_empty() || peers.contains(kind),
        };
        let subjects: Vec<_> = Kind::ALL.into_iter().filter(compared).collect();
        let programs = wanted("programs") && subjects.contains(&Kind::SteerPacket);
        Ok(Self {
            profile,
            size,
            cases: chosen,
            programs: programs && (profile != Profile::Quick || !only.is_empty()),
            memory: wanted("memory"),
            outlive: Event::ALL
                .into_iter()
                .filter(|event| wanted(event.name()) && (profile != Profile::Quick || !only.is_empty()))
                .collect(),
            subjects,
            client_settings: Vec::new(),
        })
    }

    /// The number of runs of the load generator, without those of `memory`, `programs` and
    /// `outlive`.
    pub(crate) fn runs(&self) -> usize {
        self.cases.len() * self.size.rounds * self.subjects.len()
    }

    /// The approximate time of one run: the start of the generator, opening, warm-up, span, and the
    /// end of the streams.
    pub(crate) fn duration_of(&self, case: &Case) -> Duration {
        let connections = u32::try_from(case.connections()).unwrap_or(u32::MAX);
        let around = Duration::from_millis(350) + connections * Duration::from_micros(300);
        self.size.warm_up + self.size.span + around
    }

    /// The approximate time of everything.
    pub(crate) fn duration(&self) -> Duration {
        let each = u32::try_from(self.size.rounds * self.subjects.len()).unwrap_or(u32::MAX);
        let loads: Duration = self.cases.iter().map(|case| self.duration_of(case) * each).sum();
        let per_subject = match self.profile {
            Profile::Quick => 5,
            Profile::Standard => 20,
            Profile::Full => 60,
        };
        let subjects = u64::try_from(self.subjects.len()).unwrap_or(u64::MAX);
        let memory = Duration::from_secs(if self.memory { per_subject * subjects } else { 0 });
        let programs = Duration::from_secs(if self.programs { 30 } else { 0 });
        let events = u64::try_from(self.outlive.len()).unwrap_or(u64::MAX);
        let outlive = Duration::from_secs(18 * events * subjects);
        loads + memory + programs + outlive
    }
}

impl Case {
    fn new(work: Work) -> Self {
        let (workload, pairs, name) = match work {
            Work::Echo { connections, bytes, rate: None } => (
                "echo",
                vec![("connections", json!(connections)), ("bytes", json!(bytes))],
                format!("echo/{connections}x{bytes}"),
            ),
            Work::Echo { connections, bytes, rate: Some(rate) } => (
                "echo",
                vec![("connections", json!(connections)), ("bytes", json!(bytes)), ("rate", json!(rate))],
                format!("echo/{connections}x{bytes}@{rate}"),
            ),
            Work::Bulk { streams, direction } => (
                "bulk",
                vec![("connections", json!(streams)), ("direction", json!(direction))],
                format!("bulk/{streams}-{}", lower(&json!(direction))),
            ),
            Work::FanOut { connections, active, bytes } => (
                "fan_out",
                vec![("connections", json!(connections)), ("active", json!(active)), ("bytes", json!(bytes))],
                format!("fan_out/{connections}-{active}"),
            ),
            Work::Upgrades { parallel } => {
                ("upgrades", vec![("connections", json!(parallel))], format!("upgrades/{parallel}"))
            }
            Work::Polling { connections, bytes, method } => (
                "polling",
                vec![("connections", json!(connections)), ("bytes", json!(bytes)), ("method", json!(method))],
                format!("polling/{}-{bytes}", lower(&json!(method))),
            ),
            Work::Hold { connections } => {
                ("hold", vec![("connections", json!(connections))], format!("hold/{connections}"))
            }
        };
        let params = pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { work, workload, params, name }
    }

    pub(crate) const fn connections(&self) -> usize {
        match self.work {
            Work::Echo { connections, .. }
            | Work::FanOut { connections, .. }
            | Work::Polling { connections, .. }
            | Work::Hold { connections } => connections,
            Work::Bulk { streams, .. } => streams,
            Work::Upgrades { parallel } => parallel,
        }
    }

    /// The workload and its parameters, as in results.
    pub(crate) const fn key(&self) -> (&'static str, &Params) {
        (self.workload, &self.params)
    }
}

fn lower(word: &serde_json::Value) -> String {
    word.as_str().unwrap_or_default().to_lowercase()
}

fn cases(profile: Profile) -> Vec<Case> {
    let quick = profile == Profile::Quick;
    let echo: &[(usize, usize)] = if quick {
        &[(1, 64), (100, 64)]
    } else {
        &[
            (1, 64),
            (100, 64),
            (1000, 64),
            (5000, 64),
            (1, 512),
            (100, 512),
            (1000, 512),
            (5000, 512),
            (1, 4096),
            (100, 4096),
            (1000, 4096),
            (5000, 4096),
        ]
    };
    let bulk: &[(usize, Way)] = if quick {
        &[(1, Way::Download)]
    } else {
        &[
            (1, Way::Upload),
            (1, Way::Download),
            (1, Way::Both),
            (8, Way::Upload),
            (8, Way::Download),
            (8, Way::Both),
        ]
    };
    let polling: &[(Method, usize)] = if quick {
        &[(Method::Get, 200)]
    } else {
        &[(Method::Get, 200), (Method::Post, 200), (Method::Get, 16 * 1024), (Method::Post, 16 * 1024)]
    };
    let echo = echo.iter().map(|&(connections, bytes)| Work::Echo { connections, bytes, rate: None });
    // A rate that even the slowest subject reaches. So all subjects do the same work, and only
    // their processor time differs.
    let paced = (!quick).then_some(Work::Echo { connections: 100, bytes: 64, rate: Some(20_000) });
    let bulk = bulk.iter().map(|&(streams, direction)| Work::Bulk { streams, direction });
    let fan_out = (!quick).then_some(Work::FanOut { connections: 5000, active: 50, bytes: 64 });
    let upgrades = Work::Upgrades { parallel: 64 };
    let polling = polling.iter().map(|&(method, bytes)| Work::Polling { connections: 64, bytes, method });
    echo.chain(paced).chain(bulk).chain(fan_out).chain([upgrades]).chain(polling).map(Case::new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(profile: Profile, only: &[&str], peers: &[Kind]) -> Result<Plan> {
        let only: Vec<_> = only.iter().map(|&name| name.to_owned()).collect();
        Plan::new(profile, Size::of(profile), &only, peers)
    }

    #[test]
    fn the_quick_profile_ends_within_four_minutes_and_all_have_five_rounds() {
        assert!(plan(Profile::Quick, &[], &[]).unwrap().duration() < Duration::from_secs(220));
        for profile in [Profile::Quick, Profile::Standard, Profile::Full] {
            assert!(Size::of(profile).rounds >= 5);
        }
    }

    #[test]
    fn names_are_unique_and_choose_cases() {
        let all = plan(Profile::Full, &[], &[]).unwrap();
        let mut names: Vec<_> = all.cases.iter().map(|case| &case.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.cases.len());
        let some = plan(Profile::Full, &["echo/100x", "bulk"], &[Kind::Envoy]).unwrap();
        assert_eq!(some.cases.len(), 4 + 6);
        assert_eq!(some.subjects, [Kind::Direct, Kind::Envoy]);
        assert!(!some.memory && !some.programs);
        assert!(plan(Profile::Full, &["ecco"], &[]).is_err());
    }

    #[test]
    fn what_the_quick_profile_leaves_out_can_be_asked_for_by_name() {
        let fan_out = plan(Profile::Quick, &["fan_out"], &[]).unwrap();
        assert_eq!(fan_out.cases.len(), 1);
        assert!(plan(Profile::Quick, &["programs"], &[]).unwrap().programs);
        assert_eq!(plan(Profile::Quick, &["outlive/kill"], &[]).unwrap().outlive, [Event::Kill]);
        assert!(plan(Profile::Quick, &[], &[]).unwrap().outlive.is_empty());
    }
}
