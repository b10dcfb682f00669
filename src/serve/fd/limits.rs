//! How many connections there may be: each is a descriptor of ours for as long as a model is open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most connections of processes that have models open, however many descriptors we may have.
pub const MAX_POD_CONNECTIONS: usize = 16_384;

/// Raises the limit of open descriptors to what this process may have; the limit that is in force then.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let in_force = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        Err(error) => {
            tracing::warn!(%error, "the limit of open descriptors stays as it is");
            limit.current
        }
    };
    in_force.unwrap_or(u64::MAX)
}

/// The half of our descriptors; the other is for HTTP, pulls, the disk, and batches on their way.
pub fn most_connections(descriptor_limit: u64) -> usize {
    usize::try_from(descriptor_limit / 2).unwrap_or(MAX_POD_CONNECTIONS).min(MAX_POD_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_to_others() {
        assert_eq!(most_connections(1024), 512);
        assert_eq!(most_connections(u64::MAX), MAX_POD_CONNECTIONS);
    }
}
