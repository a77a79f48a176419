//! What runs next: a choice among jobs, made anew for every step of the model.

/// Most tokens of prompts that one step reads, over all its sequences. Bounds the time until a deadline, a cancel or a new job
/// is noticed.
pub(super) const MAX_PREFILL_ROWS: usize = 512;
/// The same where a card reads all of them, which is some hundred times as fast.
pub(super) const MAX_CARD_ROWS: usize = 4096;

/// What the choice needs to know of a job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Equal for jobs that can share a step.
    pub student: usize,
    pub background: bool,
    /// Tokens that are not in the sequence's cache yet; at least 1.
    pub left: usize,
    /// Whether the prompt has been read.
    pub decoding: bool,
}

/// Places in `slots` (oldest job first) that the next step takes, and how many tokens of each, `most_rows` at most of prompts; all of one student.
/// Background jobs run only where no other job is there. Students take turns: the next one after `last`.
pub(super) fn next(
    slots: &[Slot],
    last: usize,
    max_batch: usize,
    most_rows: usize,
) -> Vec<(usize, usize)> {
    let background = slots.iter().all(|slot| slot.background);
    let able = |slot: &&Slot| slot.background == background;
    let students = || slots.iter().filter(able).map(|slot| slot.student);
    let after = students().filter(|student| *student > last).min();
    let Some(student) = after.or_else(|| students().min()) else {
        return Vec::new();
    };
    let mut budget = most_rows;
    let mut batch = Vec::new();
    for (at, slot) in slots.iter().enumerate() {
        if slot.student != student
            || slot.background != background
            || batch.len() >= max_batch.max(1)
        {
            continue;
        }
        let tokens = if slot.decoding {
            slot.left.min(most_rows)
        } else {
            let tokens = slot.left.min(budget);
            budget -= tokens;
            tokens
        };
        if tokens > 0 {
            batch.push((at, tokens));
        }
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(student: usize, background: bool, left: usize, decoding: bool) -> Slot {
        Slot {
            student,
            background,
            left,
            decoding,
        }
    }

    #[test]
    fn a_step_serves_one_student_and_students_take_turns() {
        let slots = [
            slot(7, false, 1, true),
            slot(3, false, 1, true),
            slot(7, false, 4, true),
        ];
        assert_eq!(next(&slots, 0, 16, MAX_PREFILL_ROWS), [(1, 1)]);
        assert_eq!(next(&slots, 3, 16, MAX_PREFILL_ROWS), [(0, 1), (2, 4)]);
        assert_eq!(next(&slots, 7, 16, MAX_PREFILL_ROWS), [(1, 1)]);
        assert_eq!(next(&slots, 3, 1, MAX_PREFILL_ROWS), [(0, 1)]);
        assert_eq!(next(&[], 3, 1, MAX_PREFILL_ROWS), []);
    }

    #[test]
    fn background_jobs_wait_for_all_others() {
        let slots = [slot(1, true, 1, true), slot(2, false, 1, true)];
        assert_eq!(next(&slots, 2, 16, MAX_PREFILL_ROWS), [(1, 1)]);
        assert_eq!(next(&slots[..1], 2, 16, MAX_PREFILL_ROWS), [(0, 1)]);
    }

    #[test]
    fn prompts_share_the_rows_of_a_step_and_never_hold_up_replies() {
        let slots = [
            slot(1, false, 400, false),
            slot(1, false, 400, false),
            slot(1, false, 400, false),
            slot(1, false, 2, true),
        ];
        assert_eq!(
            next(&slots, 0, 16, MAX_PREFILL_ROWS),
            [(0, 400), (1, 112), (3, 2)]
        );
    }
}
