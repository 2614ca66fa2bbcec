//! The run in turns: for each case and for each round, every subject runs once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;

use crate::collect::{self, Run};
use crate::lanes::Lanes;
use crate::plan::{Case, Plan, Profile};
use crate::progress::Progress;
use crate::results::{LeftOut, Params, Series};
use crate::run;
use crate::spliced::Counters;
use crate::subjects::{Kind, Subject};

/// A run is repeated if more of the CPU time was stolen, in percent.
const STEAL_LIMIT: f64 = 5.0;
/// The most repeats. The run with the least stolen time counts.
const REPEATS: usize = 2;
/// The longest time of the quick profile. Repeats must not make it slower.
const QUICK_LIMIT: Duration = Duration::from_secs(215);
/// Descriptors of a process in addition to two for each connection: listeners, epoll, kept
/// connections, BPF maps.
const SPARE_DESCRIPTORS: usize = 300;

/// Set when the user wants to stop. Checked between runs.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The results of all rounds.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) series: Vec<Series>,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) repeated_runs: u64,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: Self) {
        self.series.extend(other.series);
        self.left_out.extend(other.left_out);
        self.repeated_runs += other.repeated_runs;
    }

    /// Notes that a subject could not do a load. The reason is the first line of `error`.
    pub(crate) fn leave_out(
        &mut self,
        (workload, params): (&str, &Params),
        kind: Kind,
        error: &anyhow::Error,
    ) {
        eprintln!("{workload} of {kind} is left out: {error:#}");
        self.left_out.push(LeftOut {
            workload: workload.to_owned(),
            params: params.clone(),
            subject: kind.name().to_owned(),
            reason: first_line(&format!("{error:#}")),
        });
    }
}

/// # Errors
/// After the user has asked to stop.
pub(crate) fn go_on() -> Result<()> {
    anyhow::ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// The processes and settings of the rounds.
pub(crate) struct Rounds<'a, 'n> {
    pub(crate) plan: &'a Plan,
    pub(crate) lanes: &'n Lanes,
    pub(crate) subjects: Vec<Subject<'n>>,
    /// The limit of descriptors of each process.
    pub(crate) descriptors: u64,
    pub(crate) progress: Progress,
}

impl Rounds<'_, '_> {
    /// # Errors
    /// When the user interrupts the rounds. A subject that fails is left out, with the reason.
    pub(crate) fn run(&mut self) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for case in &self.plan.cases {
            self.case(case, &mut outcome)?;
        }
        Ok(outcome)
    }

    fn case(&mut self, case: &Case, outcome: &mut Outcome) -> Result<()> {
        let mut runs: Vec<_> = self.subjects.iter().map(|subject| (subject.kind(), Vec::new())).collect();
        let mut out = vec![None; runs.len()];
        let needed = case.connections() * 2 + SPARE_DESCRIPTORS;
        if usize::try_from(self.descriptors).is_ok_and(|limit| limit < needed) {
            let reason = format!("the load needs {needed} descriptors, {} are allowed", self.descriptors);
            out.fill(Some(reason));
        }
        let planned = self.plan.duration_of(case);
        for round in 1..=self.plan.size.rounds {
            for index in 0..runs.len() {
                go_on()?;
                if out[index].is_none() {
                    let label =
                        format!("{:<20} {round}/{} {:<13}", case.name, self.plan.size.rounds, runs[index].0);
                    match self.undisturbed(index, case, &label, &mut outcome.repeated_runs) {
                        Ok(run) => runs[index].1.push(run),
                        Err(error) => {
                            eprintln!("{label} is left out: {error:#}");
                            out[index] = Some(first_line(&format!("{error:#}")));
                        }
                    }
                }
                self.progress.advance(planned);
            }
        }
        for ((kind, runs), reason) in runs.iter_mut().zip(out) {
            if let Some(reason) = reason {
                runs.clear();
                let (workload, params) = (case.workload.to_owned(), case.params.clone());
                outcome.left_out.push(LeftOut { workload, params, subject: kind.name().to_owned(), reason });
            }
        }
        outcome.series.extend(collect::series(case, &runs));
        Ok(())
    }

    /// One run. It is repeated if time was stolen or if it had errors. The run without errors that
    /// lost the least time counts.
    fn undisturbed(&mut self, index: usize, case: &Case, label: &str, repeated: &mut u64) -> Result<Run> {
        let mut best: Option<Run> = None;
        let mut failure = None;
        for attempt in 0..=REPEATS {
            *repeated += u64::from(attempt > 0);
            match self.once(index, case) {
                Ok(run) => {
                    self.say(&run, case, label);
                    if best.as_ref().is_none_or(|best| run.steal_percent() < best.steal_percent()) {
                        best = Some(run);
                    }
                }
                Err(error) => failure = Some(error),
            }
            let disturbed = best.as_ref().is_none_or(|best| best.steal_percent() > STEAL_LIMIT);
            let late = self.plan.profile == Profile::Quick && self.progress.total() > QUICK_LIMIT;
            if !disturbed || (late && best.is_some()) {
                break;
            }
        }
        best.ok_or_else(|| failure.unwrap_or_else(|| anyhow::anyhow!("every run failed")))
    }

    fn once(&mut self, index: usize, case: &Case) -> Result<Run> {
        let subject = &mut self.subjects[index];
        subject.ensure_running()?;
        let before = Counters::of(subject)?;
        let load = subject.load(case.work, self.plan.size.warm_up, self.plan.size.span)?;
        let measured = run::load(self.lanes, subject, &load)?;
        subject.wait_until_quiet(self.lanes)?;
        let after = Counters::of(subject)?;
        anyhow::ensure!(measured.errors == 0, "{} connections or messages failed", measured.errors);
        anyhow::ensure!(measured.operations > 0, "nothing was done in {:.1} s", measured.seconds);
        let counters = after.zip(before);
        Ok(Run {
            measured,
            spliced_percent: counters.as_ref().and_then(|(after, before)| after.percent_since(before)),
            splice_us: counters.as_ref().and_then(|(after, before)| after.median_us_since(before)),
        })
    }

    fn say(&self, run: &Run, case: &Case, label: &str) {
        let rate = run.rate(case.work);
        let unit = collect::rate_metric(case.work);
        let p99 =
            run.measured.latency.map_or_else(String::new, |latency| format!("p99 {:.0} us, ", latency.p99));
        let steal = run.steal_percent();
        let disturbed = if steal > STEAL_LIMIT { ": too much" } else { "" };
        let digits = if rate < 1000.0 { 2 } else { 0 };
        self.progress.say(&format!("{label} {rate:>9.digits$} {unit}, {p99}{steal:.1} % stolen{disturbed}"));
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}
