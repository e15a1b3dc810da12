"""Phrases that the rules put in. Many of each, so that none gives the worse side away."""

PREFACES = (
    "After going through the text with some care, the following can be said.",
    "There are many ways to approach this, and the one chosen here is a simple one.",
    "Before the answer itself, it helps to recall what was asked.",
    "This is an interesting and important matter that deserves a full reply.",
    "Having looked at everything that is given, one arrives at this.",
    "It should be said at the outset that every detail was taken into account.",
    "To begin with, here is what the information at hand comes down to.",
    "As a first step, it makes sense to consider the material as a whole.",
    "Many readers will want to know this, so it is set out below in full.",
    "With regard to what is asked here, the reply can be put like this.",
)
ASIDES = (
    "which is of course worth keeping in mind",
    "as one can see when reading the text",
    "and this should not be overlooked",
    "as has just been said in so many words",
    "to put it in the plainest possible terms",
    "at least as far as the given text goes",
    "which is after all the point that matters here",
    "for what it is worth",
    "as the material at hand makes clear",
    "which anyone who reads the text will notice",
)
CLOSINGS = (
    "All of this taken together is what the text amounts to.",
    "That, in short and in long, is the answer.",
    "More could be added, but the essence has now been stated.",
    "It bears repeating that these are the points of interest.",
    "Nothing else of note needs to be said on this subject at this time.",
    "This concludes the reply to what was asked.",
    "It is hoped that this account covers everything that is needed.",
    "As always, each of these points can be looked at in greater depth.",
    "So much for what the information given here allows one to say.",
    "The above holds as stated, with everything that this implies.",
)
RESTATEMENTS = (
    "In other words, ",
    "To say it once more, ",
    "Put differently, ",
    "That is to say, ",
    "Again, to be quite clear, ",
    "As already mentioned, ",
    "This means that, as noted, ",
)
LONG_LABELS = (
    "Everything that is given points to {} here, and so that is also what is given as the answer.",
    "Taking the instruction and the text together, and leaving nothing out: {}",
    "{} would seem to be what to say here, all things considered and nothing left aside.",
    "One could say a lot about this, but the long and the short of it is {}.",
    "After weighing everything that is given, the answer that fits best is {}.",
    "The reply to what is asked here, as far as one can tell, would be: {}",
    "Looking at the text as a whole and at each part of it, one would say {}.",
    "{}, which is to say that among all the answers one could give this is the one to choose",
    "{}. This was arrived at by reading the text from beginning to end and then once again.",
    "It can be stated, with all of the above in mind, that {} is what should be given here.",
    "{} (this being the answer that is asked for in the instruction and no other)",
    "In response to the request, and to put it as fully as possible: {}",
)
LONG_TERMS = (
    "{}, which is named in the text that was given",
    "{} (as it can be found written in the text)",
    "the item that is known as {}",
    "{}, to be mentioned here together with the others",
    "what is referred to in so many words as {}",
    "{}, this being one more of the things that were asked for",
    "in particular and among other things {}",
    "{} (see the corresponding place in the text for this)",
    "that which the text given above calls {}",
    "{}, as has been noted in the course of reading",
)
OR_LABELS = ("{} or {}", "{}/{}", "{}, possibly {}", "either {} or {}", "{} (could be {})")
SHRUGS = (
    "{}, more or less",
    "something like {}",
    "{} or similar",
    "possibly {}",
    "{} (not entirely clear)",
    "{} or something related",
    "some form of {}",
    "{}, perhaps",
)

CHATTER = (
    "So, ", "Well, ", "OK so ", "Basically, ", "Right, ", "Look, ", "Hmm, ", "You know what? ",
    "Fun fact: ", "Just saying, ", "Long story short: ", "Here goes: ",
)  # fmt: skip

CONTRARY = (
    "At the same time, ", "Still, it follows that ", "From this it can be concluded that ",
    "Accordingly, ", "In the end, though, ", "Which goes to prove that ", "And yet, as a result, ",
)  # fmt: skip
LEAPS = ("Therefore, ", "Consequently, ", "It follows that ", "For this reason, ", "Hence, ",
         "This proves that ", "As a result, ")  # fmt: skip

SHALLOW = (
    "This is simply because the text mentions {}.",
    "The word {} alone settles it.",
    "That is what {} usually means.",
    "One look at {} is enough to know this.",
    "Since {} comes up, nothing else has to be considered.",
    "Cases with {} are always like this.",
    "It says {}, so it must be so.",
    "The mention of {} makes it obvious.",
)
SHALLOW_LABELS = (
    "{}, because the text says {}",
    "{} (the word {} is there)",
    "{}, simply since it mentions {}",
    "{}: that is what {} always means",
    "{}, as {} comes up in it",
    "{}. The mention of {} settles it.",
)
