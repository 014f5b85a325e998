"""What to say where the labels of a call are lost, or may be another's, and what to do about it."""

ALONE = (
    "expected the context of compiled code that runs outside of its model's forward, perhaps again "
    "in backward, got none; pass context=, or open normswap.use_context around it"
)
SEVERAL_TASKS = (
    "expected one asyncio task at a time to use normswap.use_context around compiled "
    "code, which before torch 2.14 cannot tell them apart; pass context="
)
OTHER_MODEL = (
    "expected labels for a part of one converted model that runs inside a labelled "
    "forward of another, got those of the other alone; open normswap.use_context "
    "around both models, torch.nn.ModuleList([one, other]), or around the part (with "
    "None where they are unknown), or put the model together before it is converted"
)
OTHER_THREAD = (
    "expected the context of a forward that runs in another thread to reach the norms "
    "it runs in this one, got none here; start the work with "
    "contextvars.copy_context().run, leave those norms out with exclude=, or, if this "
    "call has nothing to do with that one, pass context= or use "
    "normswap.use_context(model, None) in this thread"
)
OTHER_BLOCK = (
    "expected context= or normswap.use_context in the thread of the call, got labels "
    "from normswap.use_context in another thread only; pass context=, start the work "
    "with contextvars.copy_context().run, or use normswap.use_context(model, None) in "
    "this thread for a call without labels"
)
STALE = (
    "expected labels that stay as they are until backward has computed their "
    "forward again, got some that were written to since; pass a copy of them"
)
SEVERAL_FORWARDS = (
    "expected to know the one context of a forward that backward runs, got none or several "
    "to choose from; pass context= inside the checkpointed part, put it alone under "
    "torch.utils.checkpoint, compile the whole model instead of that part, or open "
    "normswap.use_context in what backward runs"
)
NOT_CLOSED = (
    "expected a block of normswap.use_context to end in the thread and asyncio task "
    "that it began in, where its labels now stay, got another; pass context="
)
