//! Numbers that were read several times. Pure.

/// Readings of one thing, one for each round, in the order of the rounds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// One more reading.
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The middle one; of an even number the mean of the two in the middle. `None` without readings.
    pub(super) fn median(&self) -> Option<f64> {
        let sorted = self.sorted();
        let (below, above) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
        Some((below + above) / 2.0)
    }

    pub(super) fn least(&self) -> Option<f64> {
        self.sorted().first().copied()
    }

    pub(super) fn most(&self) -> Option<f64> {
        self.sorted().last().copied()
    }

    /// The reading below or at which so many hundredths of all are (nearest rank). `None` without readings.
    pub(super) fn percentile(&self, hundredths: usize) -> Option<f64> {
        let sorted = self.sorted();
        let rank = (sorted.len() * hundredths).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// The median of the ratios of each pair. What was read in other rounds, or in another number of them, has no pairs:
    /// then it is the ratio of the medians.
    pub(super) fn ratio_to(&self, other: &Samples) -> Option<f64> {
        let ratio = if self.count() == other.count() {
            Samples(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect()).median()?
        } else {
            self.median()? / other.median()?
        };
        // Nothing can be said beside a zero.
        ratio.is_finite().then_some(ratio)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Samples {
        Samples(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        values.iter().copied().collect()
    }

    #[test]
    fn the_middle_is_not_moved_by_one_wild_reading() {
        assert_eq!(samples(&[3.0, 1.0, 900.0]).median(), Some(3.0));
        assert_eq!(samples(&[4.0, 1.0, 2.0, 900.0]).median(), Some(3.0));
        let one = samples(&[7.0]);
        assert_eq!((one.least(), one.median(), one.most()), (Some(7.0), Some(7.0), Some(7.0)));
        assert_eq!(samples(&[2.0, 9.0, 1.0]).least().zip(samples(&[2.0, 9.0, 1.0]).most()), Some((1.0, 9.0)));
    }

    #[test]
    fn without_readings_nothing_is_said() {
        let none = Samples::default();
        assert_eq!((none.median(), none.least(), none.most(), none.percentile(99)), (None, None, None, None));
        assert_eq!(none.ratio_to(&samples(&[1.0])), None);
    }

    #[test]
    fn a_percentile_is_a_reading_that_was_made() {
        let hundred: Samples = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            (hundred.percentile(50), hundred.percentile(99), hundred.percentile(100)),
            (Some(50.0), Some(99.0), Some(100.0))
        );
        assert_eq!(samples(&[5.0, 6.0]).percentile(99), Some(6.0));
        assert_eq!(samples(&[5.0]).percentile(0), Some(5.0));
    }

    #[test]
    fn a_ratio_is_of_the_pairs_of_each_round_when_there_are_pairs() {
        // The disk was twice as slow in the last round, for both.
        assert_eq!(samples(&[9.0, 8.0, 4.0]).ratio_to(&samples(&[10.0, 10.0, 5.0])), Some(0.8));
        assert_eq!(samples(&[9.0]).ratio_to(&samples(&[10.0, 20.0, 30.0])), Some(0.45));
        assert_eq!(samples(&[1.0]).ratio_to(&samples(&[0.0])), None);
    }
}
