//! [`JobHandle`]: a pull, a warm-up or a scrub that somebody waits on.

use tokio::sync::watch;

use crate::wire::http::{PullStatus, ScrubStatus, WarmStatus};

/// What a job publishes about itself.
pub trait JobStatus: Clone {
    /// Whether nothing will happen any more.
    fn is_final(&self) -> bool;
}

/// A job somebody waits on. Dropping it does not stop the job.
pub struct JobHandle<S> {
    /// Names the job.
    pub id: String,
    /// Where it stands.
    pub status: watch::Receiver<S>,
}

impl<S: JobStatus> JobHandle<S> {
    /// Waits for the end.
    pub async fn finished(&mut self) -> S {
        // The sender lives in the registry as long as the cache does; if both are gone, the last status is the answer.
        let _ = self.status.wait_for(S::is_final).await;
        self.status.borrow().clone()
    }
}

impl JobStatus for PullStatus {
    fn is_final(&self) -> bool {
        self.phase.is_final()
    }
}

impl JobStatus for WarmStatus {
    fn is_final(&self) -> bool {
        self.phase.is_final()
    }
}

impl JobStatus for ScrubStatus {
    fn is_final(&self) -> bool {
        self.phase.is_final()
    }
}
