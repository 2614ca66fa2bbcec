//! The reaper: one task that looks after all streams without sockets.

use std::sync::Arc;
use std::time::Duration;

use proxy_common::flow::event;
use steer_kernel::bpf::packet::FlowEvents;
use steer_kernel::grace::Grace;
use tokio::time::{MissedTickBehavior, interval};

use super::owned_record::RecordPool;
use super::table::Table;

/// How often the reaper looks for changes without an event or with a lost event, and sends the
/// heartbeat.
const SWEEP: Duration = Duration::from_secs(1);

pub(super) async fn run(
    table: Arc<Table>,
    records: Arc<RecordPool>,
    grace: Arc<Grace>,
    mut events: FlowEvents,
) {
    let mut sweeps = interval(SWEEP);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events_work = true;
    loop {
        let mut told = Vec::new();
        tokio::select! {
            read = events.read(|event| told.push(event)), if events_work => if let Err(error) = read {
                tracing::error!(%error, "cannot read the packet splice's events; ends of streams are noticed later");
                events_work = false;
            },
            _ = sweeps.tick() => {
                if let Err(error) = records.kernel.send_heartbeat() {
                    tracing::debug!(%error, "cannot tell the kernel that this process lives");
                }
                if !table.is_empty() {
                    table.sweep(events_work).await;
                }
            }
            () = records.changed.notified() => {}
        }
        // A FIN alone needs no step.
        for event in told.into_iter().filter(|event| event.kind != event::FIN) {
            table.examine(event.flow.record(), event.generation);
        }
        table.examine_records(&records.take_asked());
        let retired = records.take_retired();
        if !retired.is_empty() {
            grace.wait().await;
            records.free(retired);
        }
    }
}
