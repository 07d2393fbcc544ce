package fsck

import (
	"context"
	"errors"
	"fmt"

	"github.com/imagestack/imagestack/backend"
)

// maxRounds bounds how often a file is repaired again because the last repair
// brought more to light.
const maxRounds = 6

// RepairOptions say how Repair goes about it.
type RepairOptions struct {
	// Options for the checker; Plan is ignored.
	Options
	// Decide is nil for a check that changes nothing (DecideNo is a dry run of
	// a repair, with the same result).
	Decide     Decide
	Details    int // as in CollectorOptions
	OnProgress func(pass int, done, total int64)
	// Plan bounds the plans.
	Plan PlanOptions
	// Undo makes the undo file; it is called once, before the first change.
	// Repair does not close it.
	Undo func() (backend.File, error)
	// Execute is used for every round, with Undo filled in.
	Execute ExecuteOptions
	// Swap replaces the whole content of the file durably and returns the new
	// file, for plans made by Plan.Replace; nil writes in place.
	Swap func(content []byte) (backend.File, error)
}

// Result is what Repair found and did.
type Result struct {
	// Found is the report on the image as it was. Its Fixed are the fixes that
	// were done.
	Found *Report
	// Later are the reports of further rounds: what came to light only after
	// the repair before.
	Later []*Report
	// Left is the report on the image as it is now. It is Found when nothing
	// was changed.
	Left *Report
	// Changed reports whether the file was changed.
	Changed bool
}

// Fixed is how many findings were fixed.
func (r *Result) Fixed() (n int64) {
	if r.Found == nil {
		return 0
	}
	for _, rep := range append([]*Report{r.Found}, r.Later...) {
		for _, c := range rep.Counts {
			n += c.Fixed
		}
	}
	return n
}

// then is the result of a second repair of the same file after r.
func (r *Result) then(next *Result) *Result {
	if next == nil || next.Found == nil {
		return r
	}
	out := *r
	if next.Changed {
		out.Later = append(append([]*Report(nil), r.Later...), next.Found)
		out.Later = append(out.Later, next.Later...)
		out.Changed = true
	}
	out.Left = next.Left
	if !out.Changed {
		out.Found = next.Left
	}
	return &out
}

// Repair checks f, fixes what o.Decide wants, and checks again until nothing
// more comes to light. f must be writable and locked unless Decide is nil.
//
// On error the Result says how far it came: with Changed the image was changed
// and the undo file is complete.
func Repair(ctx context.Context, c Checker, f backend.File, o RepairOptions) (*Result, error) {
	res := &Result{}
	var undo backend.File
	for round := 0; ; round++ {
		rep, plan, err := checkOnce(ctx, c, f, o, o.Decide != nil && round < maxRounds)
		if err != nil {
			return res, err
		}
		res.Left = rep
		if round == 0 {
			res.Found = rep
		}
		if plan == nil {
			return res, nil
		}
		if plan.Empty() {
			return res, errors.Join(plan.Close(), unmetWishes(rep))
		}
		if undo == nil {
			undo, err = o.Undo()
		}
		if err != nil {
			return res, errors.Join(err, plan.Close())
		}
		if round > 0 {
			res.Later = append(res.Later, rep)
		}
		e := o.Execute
		e.Undo = undo
		next := f
		if o.Swap != nil {
			e.Swap = func(content []byte) (err error) {
				next, err = o.Swap(content)
				return err
			}
		}
		undone, err := plan.Execute(ctx, e)
		res.Changed = res.Changed || !undone
		if err := errors.Join(err, plan.Close()); err != nil {
			return res, err
		}
		f = next
	}
}

// unmetWishes is a defect of a checker: fixes wanted, nothing planned.
func unmetWishes(r *Report) error {
	for _, c := range r.Counts {
		if c.Fixed > 0 {
			return fmt.Errorf("%w: the fix of %s is not in the plan", ErrPlan, c.Code)
		}
	}
	return nil
}

// checkOnce is one walk. The plan is nil without repair.
func checkOnce(ctx context.Context, c Checker, f backend.File, o RepairOptions, repair bool) (*Report, *Plan, error) {
	co := CollectorOptions{File: f.Name(), Details: o.Details, OnProgress: o.OnProgress}
	opt := o.Options
	opt.Plan = nil
	var plan *Plan
	if repair {
		var err error
		if plan, err = NewPlan(f, o.Plan); err != nil {
			return nil, nil, err
		}
		co.Decide, opt.Plan = o.Decide, plan
	}
	col := NewCollector(co)
	stats, err := c.Check(ctx, f, opt, col)
	if err != nil {
		if plan != nil {
			err = errors.Join(err, plan.Close())
		}
		return nil, nil, err
	}
	return col.Sum(stats), plan, nil
}
