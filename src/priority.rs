//! When the disk serves a thread, beside everybody else who uses it.

use std::marker::PhantomData;

use libc::{c_int, c_long};

/// `IOPRIO_WHO_PROCESS` of `linux/ioprio.h`: with the number 0 it is the thread that asks.
const WHO_PROCESS: c_int = 1;
/// The class stands above so many bits of level.
const CLASS_SHIFT: c_int = 13;
/// As if nothing had ever been said: best effort, by how nice the thread is.
const CLASS_NONE: c_int = 0;
/// Served when nobody else wants anything of the disk. The scheduler of the disk decides what it makes of that: `bfq` and
/// `mq-deadline` obey it, `none`, which many NVMe disks have, knows no order.
const CLASS_IDLE: c_int = 3;

/// What this thread reads and writes may be made to wait for what others do; when this is dropped it is as before. A thread
/// that is started meanwhile is made to wait for good.
pub struct IoPriority {
    is_idle: bool,
    /// It is the thread's, and stays with it.
    _of_this_thread: PhantomData<*const ()>,
}

impl IoPriority {
    /// Nothing is changed yet.
    pub fn of_this_thread() -> IoPriority {
        IoPriority { is_idle: false, _of_this_thread: PhantomData }
    }

    /// Whether others go first from now on. A system call if it is not so already; a kernel that refuses it leaves all as it
    /// was, which is slower for others and wrong for nobody.
    pub fn give_way(&mut self, gives_way: bool) {
        if self.is_idle != gives_way {
            set_class(if gives_way { CLASS_IDLE } else { CLASS_NONE });
            self.is_idle = gives_way;
        }
    }
}

impl Drop for IoPriority {
    fn drop(&mut self) {
        self.give_way(false);
    }
}

#[allow(unsafe_code)]
fn set_class(class: c_int) {
    // SAFETY: it takes three numbers, may be called by any thread at any time, and touches no memory of this process; the kernel
    // checks them and answers with an error to what it does not take.
    let _: c_long = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, class << CLASS_SHIFT) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(unsafe_code)]
    fn class() -> c_long {
        // SAFETY: as above; it only asks.
        unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) >> CLASS_SHIFT }
    }

    #[test]
    fn others_go_first_until_it_is_dropped() {
        let before = class();
        let mut priority = IoPriority::of_this_thread();
        priority.give_way(true);
        assert_eq!(class(), c_long::from(CLASS_IDLE));
        priority.give_way(false);
        assert_eq!(class(), before);
        priority.give_way(true);
        drop(priority);
        assert_eq!(class(), before);
    }
}
